"""The warm-up loss: KL between dense attention and the indexer over ALL visible positions (DeepSeek-V3.2, eq. 3).

    p[t, :] = 1/H sum_h softmax_h[t, :]        L_t = KL(p[t, :] || softmax(I[t, :]))        dL_t/dI[t, :] =
    softmax(I[t, :]) - p[t, :]

Value and gradients in q_index, k_index and w are made in the same pass over query blocks, so nothing of [T, T] exists
and backward only scales. The target is a constant: no gradient reaches q and k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.common import (
    Block,
    IndexKL,
    compute_dtype,
    no_autocast,
    query_blocks,
    topk_mask,
    visible,
    with_gradients,
)
from model.ops.index_topk.streaming import index_scores_block


def index_kl_dense(
    q: Tensor,
    k: Tensor,
    scale: float,
    q_index: Tensor,
    k_index: Tensor,
    w: Tensor,
    doc_start: Tensor,
    topk: int | None = None,
    block: int | None = None,
) -> IndexKL:
    """Sum over rows of KL(p || softmax(I)) in nats.

    Args: q, k [T, H, Dqk] decompressed queries and keys (detached by the op), scale of their softmax, q_index [T, Hi,
        di], k_index [T, di], w [T, Hi], doc_start [T]; `topk` asks for mass and oracle_mass of that selection as well.
    """
    dtype = compute_dtype(q, q_index)
    inputs = [q_index, k_index, w]
    with_grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    with torch.no_grad(), no_autocast(q):
        q_H = (q.to(dtype) * scale).transpose(0, 1)  # [H, T, D]
        k_H = k.to(dtype).permute(1, 2, 0).contiguous()  # [H, D, T]
        qi, ki, wi = (t.to(dtype) for t in inputs)
        sums = {
            name: torch.zeros((), dtype=dtype, device=q.device)
            for name in ("kl", "kl_uniform", "mass", "oracle_mass", "rows")
        }
        gradients = [torch.zeros_like(t) for t in (qi, ki, wi)] if with_grad else []
        for b in query_blocks(doc_start, 4 * (2 * q.shape[1] + 2 * q_index.shape[1]), block):
            mask = visible(doc_start, b)
            p = _target(q_H, k_H, b, mask)
            rows, keys = slice(b.start, b.stop), slice(b.key_start, b.stop)
            scores, products = index_scores_block(qi[rows], ki[keys], wi[rows])
            log_student = scores.masked_fill_(~mask, -torch.inf).log_softmax(-1).masked_fill_(~mask, 0.0)
            entropy = torch.xlogy(p, p).sum(-1)
            sums["kl"] += (entropy - (p * log_student).sum(-1)).sum()
            _add_stats(sums, p, entropy, scores, mask, topk)
            if with_grad:
                d_scores = (log_student.exp() * mask).sub_(p)
                _add_gradients(gradients, d_scores, products, qi[rows], ki[keys], wi[rows], rows, keys)
    kl = sums.pop("kl")
    if with_grad:
        kl = with_gradients(kl, inputs, [g.to(t.dtype) for g, t in zip(gradients, inputs, strict=True)])
    if topk is None:
        del sums["mass"], sums["oracle_mass"]
    return IndexKL(kl, sums)


def _target(q_H: Tensor, k_H: Tensor, b: Block, mask: Tensor) -> Tensor:
    """p [rows, keys]: the mean over heads of dense attention; rows without a visible key are 0."""
    logits = torch.bmm(q_H[:, b.start : b.stop], k_H[:, :, b.key_start : b.stop])
    logits.masked_fill_(~mask, -torch.inf)
    # a row that sees nothing is softmax of -inf alone (NaN), masked to zero here
    return logits.softmax(-1).mean(0).masked_fill_(~mask, 0.0)


def _add_stats(
    sums: dict[str, Tensor], p: Tensor, entropy: Tensor, scores: Tensor, mask: Tensor, topk: int | None
) -> None:
    seen = mask.sum(-1)
    sums["rows"] += (seen > 0).sum()
    sums["kl_uniform"] += (entropy + seen.clamp(min=1).to(p.dtype).log())[seen > 1].sum()
    if topk is not None:
        sums["mass"] += (p * topk_mask(scores, mask, topk)).sum()
        sums["oracle_mass"] += p.topk(min(topk, p.shape[-1]), dim=-1).values.sum()


def _add_gradients(
    gradients: list[Tensor],
    d_scores: Tensor,
    products: Tensor,
    q: Tensor,
    k: Tensor,
    w: Tensor,
    rows: slice,
    keys: slice,
) -> None:
    """Through I = sum_h w relu(q.k): products [rows, Hi, keys] are overwritten."""
    d_q, d_k, d_w = gradients
    d_w[rows] = torch.bmm(products, d_scores.unsqueeze(-1)).squeeze(-1)
    weighted = (
        products.sign_().mul_(d_scores.unsqueeze(1)).mul_(w.unsqueeze(-1)).view(-1, k.shape[0])
    )  # relu' is 0 or 1
    d_q[rows] = (weighted @ k).view(q.shape)
    d_k[keys] += weighted.T @ q.reshape(-1, q.shape[-1])
