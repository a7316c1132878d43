"""index_topk as its callers see it: precision and backend chosen, rows cut to the workspace."""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.common import no_autocast, positions
from model.ops.index_topk import streaming
from model.ops.settings import DEFAULT, OpSettings


@torch.no_grad()
def index_topk(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    doc_start: Tensor,
    topk: int,
    q_pos: Tensor | None = None,
    settings: OpSettings = DEFAULT,
    block: int | None = None,
) -> Tensor:
    """Selected keys of every query row.

    Args: q [R, Hi, di], k [S, di], w [R, Hi] (scaled by Hi^-0.5 di^-0.5), doc_start [R] int64, topk, q_pos [R]
        positions of the rows among the keys (default 0, 1, 2, ...), block (rows; default by the workspace).
    Returns: [R, topk] int32, ascending, ties to the lowest index, -1 behind.
    """
    with no_autocast(q):
        if settings.backend == "torch":
            return streaming.topk(q, k, w, doc_start, q_pos, topk, settings, block)
        return _triton(q, k, w, doc_start, q_pos, topk, settings, block)


def _triton(q, k, w, doc_start, q_pos, topk, settings, block):
    from model.ops.index_topk import fp8_kernel, kernel

    first, last = doc_start.int(), positions(doc_start, q_pos).int()
    q, k, w, k_scale = q.contiguous(), k.contiguous(), w.contiguous(), None
    if settings.fp8_index:
        k, k_scale = fp8_kernel.rotate_and_quantise(k)
    row_bytes = kernel.scratch_bytes(topk) + q.shape[1] * (q.shape[2] + 8)  # queries in FP8, their scales and w
    rows = block or max(1, settings.workspace // row_bytes)
    indices = torch.empty(q.shape[0], topk, dtype=torch.int32, device=q.device)
    for start in range(0, q.shape[0], rows):
        part = slice(start, start + rows)
        q_b, w_b = q[part], w[part].float()
        if settings.fp8_index:
            q_b, scale = fp8_kernel.rotate_and_quantise(q_b)
            w_b = w_b * scale
        indices[part] = kernel.topk(q_b, k, w_b, first[part], last[part], topk, k_scale=k_scale)
    return indices
