from model.ops.index_topk.op import index_topk
from model.ops.index_topk.streaming import index_scores_block

__all__ = ["index_topk", "index_scores_block"]
