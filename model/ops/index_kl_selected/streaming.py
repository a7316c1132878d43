"""Index scores over the selected keys and their gradients, in plain torch, for all query rows.

    I[t, j] = sum_h w[t, h] relu(q[t, h] . k[idx[t, j]])

Gathered keys live for one block of queries. The loss hands over d_scores block by block, while the products that made
the scores still exist, so nothing is made twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.ops.common import Scratch
from model.ops.sparse_mla.streaming import selected_blocks


def each_block(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    idx: Tensor,
    loss: Callable[[slice, Tensor, Tensor | None], Tensor],
    gradients: tuple[Tensor, Tensor, Tensor] | None,
    workspace: int,
    block: int | None = None,
) -> None:
    """Calls loss(rows, scores [n, k], empty [n, k] or None) -> d_scores for every block of q [R, Hi, di], k [S, di],
    w [R, Hi], idx [R, k]; scores are -inf at -1. `gradients` (d_q, d_k, d_w) are written, d_k added to."""
    (_, heads, dim), count = q.shape, idx.shape[1]
    scratch = Scratch(q.dtype, q.device)
    row_bytes = q.itemsize * count * (2 * dim + 2 * heads)
    for chosen in selected_blocks(k, idx, row_bytes, workspace, scratch, block):
        part, n = chosen.part, chosen.rows.shape[0]
        products = torch.bmm(q[part], chosen.rows.transpose(1, 2), out=scratch("products", n, heads, count)).relu_()
        scores = torch.bmm(w[part].unsqueeze(1), products).squeeze(1)
        if chosen.empty is not None:
            scores.masked_fill_(chosen.empty, -torch.inf)
        d_scores = loss(part, scores, chosen.empty)
        if gradients is None:
            continue
        d_q, d_k, d_w = gradients
        d_w[part] = torch.bmm(products, d_scores.unsqueeze(-1)).squeeze(-1)
        # d_scores where the product is positive: relu'(0) = 0. w multiplies what is small: d_q's rows, and q.
        passed = scratch("passed", n, heads, count)
        torch.ops.aten.threshold_backward.grad_input(
            d_scores.unsqueeze(1).expand_as(products), products, 0.0, grad_input=passed
        )
        d_q[part] = torch.bmm(passed, chosen.rows).mul_(w[part].unsqueeze(-1))
        weighted = q[part] * w[part].unsqueeze(-1)
        d_rows = torch.bmm(passed.transpose(1, 2), weighted, out=scratch("d_rows", n, count, dim))
        d_k.index_add_(0, chosen.flat, d_rows.view(n * count, dim))
