"""The warm-up loss as its callers see it: KL between dense attention and the indexer over ALL visible positions.

Value and gradients in q_index, k_index and w are made in one pass and backward only scales. The target is a constant:
no gradient reaches q, k and v. The attention output comes out of the same pass, so a warm-up layer computes dense
attention once.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from model.ops.common import IndexKL, no_autocast, with_gradients
from model.ops.index_kl_dense import streaming
from model.ops.settings import DEFAULT, OpSettings


def _form(settings: OpSettings) -> ModuleType:
    if settings.backend == "torch":
        return streaming
    from model.ops.index_kl_dense import chunked  # Triton is imported where it is asked for

    return chunked


def index_kl_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    scale: float,
    q_index: Tensor,
    k_index: Tensor,
    w: Tensor,
    doc_start: Tensor,
    topk: int | None = None,
    q_pos: Tensor | None = None,
    settings: OpSettings = DEFAULT,
    block: int | None = None,
    row_topk: tuple[int, ...] = (),
) -> tuple[Tensor | None, IndexKL]:
    """Dense attention's output and the sum over rows of KL(p || softmax(I)) in nats.

    Args: q [R, H, Dqk], k [S, H, Dqk], v [S, H, Dv] decompressed (constants here; v None: no output), scale of their
        softmax, q_index [R, Hi, di], k_index [S, di], w [R, Hi], doc_start [R]; `topk` asks for mass and oracle_mass of
        that selection as well; q_pos [R]: positions of the rows among the keys (context parallelism; default 0, 1..);
        row_topk: selections of other sizes, of which each row is asked.
    Returns: [R, H, Dv] without gradient (rows that see nothing are 0) or None, and the loss; with row_topk its stats
        hold by_row [len(row_topk), 3, R]: mass, oracle_mass, and the keys that both selections share.
    """
    inputs = [q_index, k_index, w]
    with_grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    with torch.no_grad(), no_autocast(q):
        out, sums, gradients = _form(settings).attend_and_learn(
            q, k, v, scale, q_index, k_index, w, doc_start, q_pos, topk, with_grad, settings, block, row_topk
        )
    kl = sums.pop("kl")
    if gradients is not None:
        kl = with_gradients(kl, inputs, [g.to(t.dtype) for g, t in zip(gradients, inputs, strict=True)])
    return (None if out is None else out.to(q.dtype)), IndexKL(kl, sums)
