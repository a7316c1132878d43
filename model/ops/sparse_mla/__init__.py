from model.ops.sparse_mla.streaming import sparse_mla

__all__ = ["sparse_mla"]
