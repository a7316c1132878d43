from model.ops.index_kl_dense.op import index_kl_dense

__all__ = ["index_kl_dense"]
