"""Dense attention and the warm-up loss in one pass over query blocks, in plain torch (DeepSeek-V3.2, eq. 3).

    p[t, :] = 1/H sum_h softmax_h[t, :]    L_t = KL(p[t, :] || softmax(I[t, :]))    dL_t/dI = softmax(I[t, :]) - p[t, :]

A block of queries against all its keys, one head at a time: the row's softmax is complete, so the head's output, its
share of the target, the loss and every gradient come from a single product of queries and keys. Workspace: a few
[rows, keys] buffers and two of [rows, Hi, keys], whatever the number of attention heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.common import MAX_ROWS, Block, Hidden, Scratch, compute_dtype, query_blocks
from model.ops.index_kl_dense.loss import learn_block, new_sums, selection_rows
from model.ops.index_topk.streaming import index_scores_block
from model.ops.settings import DEFAULT, OpSettings

CPU_ROWS = 64  # more rows a block gain nothing and cost memory


def attend_and_learn(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    scale: float,
    q_index: Tensor,
    k_index: Tensor,
    w: Tensor,
    doc_start: Tensor,
    q_pos: Tensor | None,
    topk: int | None,
    with_grad: bool,
    settings: OpSettings = DEFAULT,
    block: int | None = None,
    row_topk: tuple[int, ...] = (),
) -> tuple[Tensor | None, dict[str, Tensor], tuple[Tensor, Tensor, Tensor] | None]:
    """-> attention's output [R, H, Dv] (None without v), the sums over rows (and `by_row`, see op.py), and the
    gradients of q_index, k_index, w.

    Args: q [R, H, Dqk], k [S, H, Dqk], v [S, H, Dv], q_index [R, Hi, di], k_index [S, di], w [R, Hi].
    """
    dtype = compute_dtype(q, q_index)
    q_H = (q.to(dtype) * scale).transpose(0, 1)
    k_H = k.to(dtype).permute(1, 2, 0)  # [H, D, S]
    v_H = None if v is None else v.to(dtype).transpose(0, 1)
    qi, ki, wi = (t.to(dtype) for t in (q_index, k_index, w))
    heads, index_heads = q.shape[1], q_index.shape[1]
    out = None if v is None else torch.zeros(*q.shape[:2], v.shape[2], dtype=dtype, device=q.device)
    sums = new_sums(topk, qi)
    if row_topk:
        sums["by_row"] = torch.zeros(len(row_topk), 3, q.shape[0], dtype=sums["kl"].dtype, device=q.device)
    gradients = (torch.zeros_like(qi), torch.zeros_like(ki), torch.zeros_like(wi)) if with_grad else None
    bytes_per_pair = dtype.itemsize * (7 + 2 * index_heads)
    scratch = Scratch(dtype, q.device)
    most = CPU_ROWS if q.device.type == "cpu" else MAX_ROWS
    for b in query_blocks(doc_start, q_pos, bytes_per_pair, settings, block, most):
        hidden = Hidden(doc_start, q_pos, b)
        p = scratch("p", *b.shape).zero_()
        for h in range(heads):
            logits = torch.mm(q_H[h, b.rows], k_H[h, :, b.keys], out=scratch("logits", *b.shape))
            probabilities = torch.softmax(hidden.fill(logits, -torch.inf), -1, out=scratch("softmax", *b.shape))
            if hidden.empty is not None:
                probabilities.masked_fill_(hidden.empty, 0.0)  # softmax of -inf alone is NaN
            p += probabilities
            if out is not None and v_H is not None:
                out[b.rows, h] = probabilities @ v_H[h, b.keys]
        p /= heads
        scores, products = index_scores_block(qi[b.rows], ki[b.keys], wi[b.rows], scratch)
        hidden.fill(scores, -torch.inf)
        for place, count in enumerate(row_topk):
            sums["by_row"][place, :, b.rows] = selection_rows(scores, p, hidden, count, scratch)
        d_scores = learn_block(sums, scores, p, hidden, topk, scratch)
        if gradients is not None:
            _add_gradients(gradients, d_scores, products, qi[b.rows], ki[b.keys], wi[b.rows], b, scratch)
    return out, sums, gradients


def _add_gradients(gradients, d_scores, products, q, k, w, b: Block, scratch) -> None:
    """Through I = sum_h w relu(q.k), products [rows, Hi, keys]. w multiplies what is small: d_q's rows and q."""
    d_q, d_k, d_w = gradients
    d_w[b.rows] = torch.bmm(products, d_scores.unsqueeze(-1)).squeeze(-1)
    passed = scratch("passed", *products.shape)
    # d_scores where the product is positive: relu'(0) = 0
    torch.ops.aten.threshold_backward.grad_input(
        d_scores.unsqueeze(1).expand_as(products), products, 0.0, grad_input=passed
    )
    passed = passed.view(-1, k.shape[0])
    d_q[b.rows] = (passed @ k).view(q.shape) * w.unsqueeze(-1)
    d_k[b.keys] += passed.T @ (q * w.unsqueeze(-1)).flatten(0, 1)
