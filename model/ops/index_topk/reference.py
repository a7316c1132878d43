"""Lightning-indexer scores and top-k by brute force: the whole [T, T] matrix, sorted.

DeepSeek-V3.2 report (arXiv 2512.02556), eq. 1-2: I[t,s] = sum_h w[t,h] * relu(q[t,h] . k[s]), S_t = top-k of I[t,:].
The paper leaves ties open; here they go to the lowest position, so that a selection can be repeated bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(doc_start: Tensor) -> Tensor:
    """[T] -> bool [T, T]: row t sees s with doc_start[t] <= s <= t. Padding rows (doc_start = T) see nothing."""
    position = torch.arange(doc_start.shape[0], device=doc_start.device)
    return (position[None, :] >= doc_start[:, None]) & (position[None, :] <= position[:, None])


def index_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """q [T, Hi, di], k [T, di], w [T, Hi] (already times Hi^-0.5 * di^-0.5) -> I [T, T], unmasked."""
    dots = torch.einsum("thd,sd->ths", q, k)
    return torch.einsum("th,ths->ts", w, dots.relu())


def select_topk(scores: Tensor, allowed: Tensor, topk: int) -> Tensor:
    """scores [T, T], allowed bool [T, T] -> int64 [T, topk]: each row's best allowed columns, ascending, then -1."""
    num_rows, num_cols = scores.shape
    # A stable sort keeps equal scores in column order, which is the tie rule; what is not allowed sorts last.
    order = scores.masked_fill(~allowed, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    best = order[:, :topk]
    best = best.masked_fill(~allowed.gather(1, best), num_cols)
    best = torch.cat([best, best.new_full((num_rows, max(topk - num_cols, 0)), num_cols)], dim=1)
    best = best.sort(dim=-1).values
    return best.masked_fill(best == num_cols, -1)


@torch.no_grad()
def index_topk(q: Tensor, k: Tensor, w: Tensor, doc_start: Tensor, topk: int) -> Tensor:
    """The `topk` best visible positions of each row -> int64 [T, topk], ascending, padded at the end with -1."""
    return select_topk(index_scores(q, k, w), visible(doc_start), topk)
