"""Dense causal attention over packed documents by brute force, with MLA's unequal key and value widths."""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.index_topk.reference import visible


def masked_softmax(logits: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the last dim where `allowed` (broadcast); 0 elsewhere, and in rows that allow nothing."""
    nothing = ~allowed.any(dim=-1, keepdim=True)
    # Rows without an entry go through a softmax of finite numbers and are zeroed after: no NaN, forward or backward.
    weights = logits.masked_fill(~(allowed | nothing), float("-inf")).softmax(dim=-1)
    return weights.masked_fill(nothing, 0.0)


def attention_probs(q: Tensor, k: Tensor, doc_start: Tensor, scale: float) -> Tensor:
    """q, k [T, H, Dqk] -> softmax over the visible positions, [H, T, T]; rows of padding are 0."""
    return masked_softmax(torch.einsum("thd,shd->hts", q, k) * scale, visible(doc_start))


def mla_dense(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, scale: float) -> Tensor:
    """q, k [T, H, Dqk], v [T, H, Dv], doc_start int64 [T] -> out [T, H, Dv]; rows of padding are 0."""
    return torch.einsum("hts,shv->thv", attention_probs(q, k, doc_start, scale), v)
