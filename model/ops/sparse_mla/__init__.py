from model.ops.sparse_mla.op import SparseAttention, sparse_mla

__all__ = ["SparseAttention", "sparse_mla"]
