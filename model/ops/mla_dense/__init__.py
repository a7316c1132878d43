from model.ops.mla_dense.op import mla_dense_lse
from model.ops.mla_dense.streaming import mla_dense

__all__ = ["mla_dense", "mla_dense_lse"]
