from model.ops.mla_dense.streaming import mla_dense

__all__ = ["mla_dense"]
