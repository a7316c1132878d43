"""The sparse-adaptation indexer loss by brute force: KL(p || softmax(I)), both over the selected positions S_t only.

DeepSeek-V3.2 report (arXiv 2512.02556), eq. 4. The target comes from the sparse attention itself: its `lse` is taken
over S_t, so mean_h exp(s - lse) already sums to one there. The target is a constant; so is the selection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.index_kl_dense.reference import KLResult, kl_rows
from model.ops.index_topk.reference import index_scores
from model.ops.sparse_mla.reference import selected_mask


def index_kl_selected(
    q: Tensor,
    kv: Tensor,
    lse: Tensor,
    idx: Tensor,
    scale: float,
    q_index: Tensor,
    k_index: Tensor,
    w: Tensor,
) -> KLResult:
    """q [T, H, D], kv [T, D], lse [T, H], idx int64 [T, k]; q_index [T, Hi, di], k_index [T, di], w [T, Hi].

    The masses stay None: what lies outside S_t is unknown here.
    """
    mask = selected_mask(idx, kv.shape[0])
    with torch.no_grad():
        logits = torch.einsum("thd,sd->ths", q, kv) * scale
        share = logits - lse.masked_fill(lse.isneginf(), 0.0)[..., None]
        p = share.exp().masked_fill(~mask[:, None, :], 0.0).mean(dim=1)  # [T, T]
    kl, kl_uniform = kl_rows(p, index_scores(q_index, k_index, w), mask)
    return KLResult(kl, kl_uniform, None, None, None)
