from model.ops.index_kl_selected.op import index_kl_selected

__all__ = ["index_kl_selected"]
