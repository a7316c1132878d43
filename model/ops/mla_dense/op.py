"""Dense attention: with gradients for a trunk that trains, and with its log-sum-exp for those who go on computing with
the probabilities.

A whole sequence runs through torch's SDPA. SDPA's causal mask knows no rows that start in the middle of their keys, so
a slice of a sequence (`q_pos`) runs over query blocks with a backward of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.common import no_autocast, positions
from model.ops.mla_dense import streaming
from model.ops.settings import DEFAULT, OpSettings


@torch.no_grad()
def mla_dense_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    doc_start: Tensor,
    scale: float,
    q_pos: Tensor | None = None,
    settings: OpSettings = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each document.

    Args: q [R, H, Dqk], k [S, H, Dqk], v [S, H, Dv], doc_start [R], scale of the logits, q_pos [R]: positions of the
        rows among the keys (context parallelism; default 0, 1, 2, ...).
    Returns: out [R, H, Dv] in q's dtype, 0 in rows that see nothing, and the natural log-sum-exp of the scaled logits
        [R, H], fp32 (fp64 for fp64 inputs), there -inf.
    """
    with no_autocast(q):
        if settings.backend == "torch":
            return streaming.with_lse(q, k, v, doc_start, scale, q_pos, settings)
        from model.ops.mla_dense import kernel

        first, last = doc_start.int(), positions(doc_start, q_pos).int()
        k, v = k.to(q.dtype), v.to(q.dtype)
        return kernel.forward(q.contiguous(), k.contiguous(), v.contiguous(), scale, first, last)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, doc_start, scale, q_pos, settings):
        out, lse = mla_dense_lse(q, k, v, doc_start, scale, q_pos, settings)
        ctx.save_for_backward(q, k, v, out, lse, doc_start, q_pos)
        ctx.scale, ctx.settings = scale, settings
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, lse, doc_start, q_pos = ctx.saved_tensors
        with no_autocast(q):
            found = streaming.backward(q, k, v, out, lse, d_out, doc_start, ctx.scale, q_pos, ctx.settings)
        return *found, None, None, None, None


def mla_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    doc_start: Tensor,
    scale: float,
    q_pos: Tensor | None = None,
    settings: OpSettings = DEFAULT,
) -> Tensor:
    """Causal attention inside each document; differentiable. Arguments as for `mla_dense_lse`.

    Returns [R, H, Dv] in q's dtype; rows that see nothing are 0.
    """
    if q_pos is None:
        return streaming.by_document(q, k, v, doc_start, scale)
    return _Rows.apply(q, k, v, doc_start, scale, q_pos, settings)
