"""The sparse-stage indexer loss: KL over the selected set S_t only (DeepSeek-V3.2, eq. 4).

    p[t, S_t] = 1/H sum_h exp(s[t, h, S_t] - lse[t, h])       L_t = KL(p[t, S_t] || softmax(I[t, S_t]))

`lse` is sparse_mla's own log-sum-exp, so the target costs one product over the k selected rows. Target and student are
both normalised over S_t: a student over all positions against this target would agree only where T = k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.common import IndexKL, compute_dtype, no_autocast, with_gradients
from model.ops.sparse_mla.streaming import gather_rows, selection_blocks


def index_kl_selected(
    q: Tensor,
    kv: Tensor,
    lse: Tensor,
    idx: Tensor,
    scale: float,
    q_index: Tensor,
    k_index: Tensor,
    w: Tensor,
    stats: bool = False,
    block: int | None = None,
) -> IndexKL:
    """Sum over rows of KL(p || softmax(I)) over S_t in nats; gradients go to q_index, k_index and w alone.

    Args: q [T, H, D] absorbed queries, kv [T, D], lse [T, H], idx [T, k] (-1 padded), scale, q_index [T, Hi, di],
        k_index [T, di], w [T, Hi]; `stats` adds kl_uniform and rows.
    """
    dtype = compute_dtype(q, q_index)
    inputs = [q_index, k_index, w]
    with_grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    with torch.no_grad(), no_autocast(q):
        qi, ki, wi = (t.to(dtype) for t in inputs)
        kv, lse = kv.to(dtype), lse.to(dtype)
        sums = {name: torch.zeros((), dtype=dtype, device=q.device) for name in ("kl", "kl_uniform", "rows")}
        d_q, d_k, d_w = (torch.zeros_like(t) for t in (qi, ki, wi)) if with_grad else (None, None, None)
        for start, stop in selection_blocks(idx, kv.shape[1] + 3 * qi.shape[1], block):
            rows = slice(start, stop)
            chosen, mask, flat = gather_rows(kv, idx[rows])
            logits = torch.bmm(q[rows].to(dtype), chosen.transpose(1, 2)).mul_(scale)
            p = (logits - lse[rows].unsqueeze(-1)).exp_().mean(1).masked_fill_(~mask, 0.0)
            keys = ki.index_select(0, flat).view(*mask.shape, -1)
            products = torch.bmm(qi[rows], keys.transpose(1, 2)).relu_()
            scores = torch.bmm(wi[rows].unsqueeze(1), products).squeeze(1).masked_fill_(~mask, -torch.inf)
            log_student = scores.log_softmax(-1).masked_fill_(~mask, 0.0)
            entropy = torch.xlogy(p, p).sum(-1)
            sums["kl"] += (entropy - (p * log_student).sum(-1)).sum()
            if stats:
                seen = mask.sum(-1)
                sums["rows"] += (seen > 0).sum()
                sums["kl_uniform"] += (entropy + seen.clamp(min=1).to(p.dtype).log())[seen > 1].sum()
            if d_q is not None and d_k is not None and d_w is not None:
                d_scores = (log_student.exp() * mask).sub_(p)
                d_w[rows] = torch.bmm(products, d_scores.unsqueeze(-1)).squeeze(-1)
                weighted = products.sign_().mul_(d_scores.unsqueeze(1)).mul_(wi[rows].unsqueeze(-1))
                d_q[rows] = torch.bmm(weighted, keys)
                d_k.index_add_(0, flat, torch.bmm(weighted.transpose(1, 2), qi[rows]).view(flat.shape[0], -1))
    kl = sums.pop("kl")
    if d_q is not None and d_k is not None and d_w is not None:
        kl = with_gradients(kl, inputs, [d_q.to(q_index.dtype), d_k.to(k_index.dtype), d_w.to(w.dtype)])
    return IndexKL(kl, sums if stats else {})
