from model.ops.index_topk.streaming import index_scores_block, index_topk

__all__ = ["index_topk", "index_scores_block"]
