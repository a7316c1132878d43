from model.ops.mla_dense.op import mla_dense, mla_dense_lse

__all__ = ["mla_dense", "mla_dense_lse"]
