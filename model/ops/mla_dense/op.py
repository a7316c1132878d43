"""Dense attention with its log-sum-exp, for those who go on computing with the probabilities; without gradient."""

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
        return kernel.forward(q.contiguous(), k.contiguous(), v.contiguous(), scale, first, last)
