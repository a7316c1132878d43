"""Lightning-indexer scores and their deterministic top-k, streamed over query blocks (DeepSeek-V3.2, eq. 1 and sec.
2.1).

    I[t, s] = sum_h w[t, h] * relu(q[t, h] . k[s])          S_t = top-k of I[t, :] over the keys that t may see

Ties go to the lowest index, which neither torch's nor transformers' top-k promises: relu makes exact zeros common, so
ties at the border decide whether two backends select the same tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.common import compute_dtype, mask_to_indices, no_autocast, query_blocks, topk_mask, visible


def index_scores_block(q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [rows, keys] of q [rows, Hi, di], k [keys, di], w [rows, Hi], and the relu'd products [rows, Hi, keys]."""
    rows, heads, dim = q.shape
    products = (q.reshape(rows * heads, dim) @ k.T).relu_().view(rows, heads, -1)
    return torch.bmm(w.unsqueeze(1), products).squeeze(1), products


@torch.no_grad()
def index_topk(q: Tensor, k: Tensor, w: Tensor, doc_start: Tensor, topk: int, block: int | None = None) -> Tensor:
    """Selected keys of every row.

    Args: q [T, Hi, di], k [T, di], w [T, Hi] (scaled by Hi^-0.5 di^-0.5), doc_start [T] int64, topk, block (rows).
    Returns: [T, topk] int64, ascending, -1 behind. Workspace: one block of rows x keys x Hi.
    """
    dtype = compute_dtype(q, k, w)
    q, k, w = q.to(dtype), k.to(dtype), w.to(dtype)
    indices = torch.full((q.shape[0], topk), -1, dtype=torch.int64, device=q.device)
    with no_autocast(q):
        for b in query_blocks(doc_start, 4 * (q.shape[1] + 4), block):
            scores, _ = index_scores_block(q[b.start : b.stop], k[b.key_start : b.stop], w[b.start : b.stop])
            mask = topk_mask(scores, visible(doc_start, b), topk)
            indices[b.start : b.stop] = mask_to_indices(mask, topk, b.key_start)
    return indices
