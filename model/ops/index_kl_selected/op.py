"""The sparse-stage indexer loss: KL over the selected set S_t only (DeepSeek-V3.2, eq. 4).

    p[t, S_t] = 1/H sum_h exp(s[t, h, S_t] - lse[t, h])       L_t = KL(p[t, S_t] || softmax(I[t, S_t]))

p comes from sparse_mla, where the probabilities exist. Target and student are both normalised over S_t: a student over
all positions against this target would agree only where T = k. Value and gradients are made together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.common import IndexKL, compute_dtype, no_autocast, with_gradients
from model.ops.index_kl_selected import streaming
from model.ops.settings import DEFAULT, OpSettings


def index_kl_selected(
    target: Tensor,
    idx: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    w: Tensor,
    stats: bool = False,
    settings: OpSettings = DEFAULT,
    block: int | None = None,
) -> IndexKL:
    """Sum over rows of KL(p || softmax(I)) over S_t in nats; gradients go to q_index, k_index and w alone.

    Args: target [R, k] (sums to 1 a row; sparse_mla's), idx [R, k] (-1 padded), q_index [R, Hi, di], k_index [S, di], w
        [R, Hi]; `stats` adds kl_uniform and rows.
    """
    inputs = [q_index, k_index, w]
    with_grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    dtype = compute_dtype(*inputs)
    sums = {name: torch.zeros((), dtype=dtype, device=w.device) for name in ("kl", "kl_uniform", "rows")}

    def loss(part: slice, scores: Tensor, empty: Tensor | None) -> Tensor:
        """Adds the rows' KL to the sums; returns d KL / d scores. `empty` [n, k]: entries of -1, None without any."""
        p = target[part].to(dtype)
        log_student = scores.log_softmax(-1)
        if empty is not None:
            log_student.masked_fill_(empty, 0.0)
        entropy = torch.xlogy(p, p).sum(-1)
        sums["kl"] += (entropy - torch.linalg.vecdot(p, log_student)).sum()
        if stats:
            seen = torch.full_like(entropy, p.shape[1]) if empty is None else (~empty).sum(-1).to(dtype)
            sums["rows"] += (seen > 0).sum()
            sums["kl_uniform"] += (entropy + seen.clamp(min=1).log())[seen > 1].sum()
        d_scores = log_student.exp_().sub_(p)
        return d_scores if empty is None else d_scores.masked_fill_(empty, 0.0)

    with torch.no_grad(), no_autocast(w):
        gradients = None
        if settings.backend == "triton":
            gradients = _triton(loss, q_index, k_index, w.to(dtype), idx, with_grad, settings, block)
        else:
            q, k, w_c = (t.to(dtype) for t in inputs)
            if with_grad:
                gradients = torch.empty_like(q), torch.zeros_like(k), torch.empty_like(w_c)
            streaming.each_block(q, k, w_c, idx, loss, gradients, settings.workspace, block)
    kl = sums.pop("kl")
    if gradients is not None:
        kl = with_gradients(kl, inputs, [g.to(t.dtype) for g, t in zip(gradients, inputs, strict=True)])
    return IndexKL(kl, sums if stats else {})


def _triton(loss, q, k, w, idx, with_grad, settings, block):
    """Scores of a chunk of rows, the loss on them in torch, and the gradients from d_scores."""
    from model.ops.index_kl_selected import kernel

    gradients = None
    q, k, w, idx = q.contiguous(), k.contiguous(), w.contiguous(), idx.int().contiguous()
    if with_grad:
        gradients = tuple(torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (q, k, w))
    rows = block or max(1, settings.workspace // (4 * 6 * idx.shape[1]))
    for start in range(0, q.shape[0], rows):
        part = slice(start, start + rows)
        scores = kernel.scores(q[part], k, w[part], idx[part])
        d_scores = loss(part, scores, idx[part] < 0)
        if gradients is not None:
            gradients[0][part], gradients[2][part] = kernel.backward(
                q[part], k, w[part], idx[part], d_scores, gradients[1],
                deterministic=settings.deterministic, workspace=settings.workspace,
            )  # fmt: skip
    return gradients
