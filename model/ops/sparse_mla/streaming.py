"""Absorbed attention over the selected rows in plain torch, for a chunk of queries (DeepSeek-V3.2, eq. 2).

    s[t, h, j] = scale * q[t, h] . kv[idx[t, j]]      out[t, h] = sum_j softmax_j(s)[t, h, j] * kv[idx[t, j], :C]

Every head reads the same rows, so a selected token costs one row whatever the number of heads. Gathered rows and
probabilities live for one block of queries; backward gathers and scores again instead of saving them.
On CPU a block's scratch are made once and stay in the second-level cache: the arithmetic, not memory, is the cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.ops.common import Scratch

BLOCK_BYTES = 4 << 20  # of a block on CPU: small enough for the caches, large enough to hide the calls
BLOCK_ROWS = 8, 64


@dataclass(frozen=True)
class Selected:
    """A block of query rows with what they selected: rows [n, k, D] of the keys, their flat int64 positions [n * k],
    and `empty` [n, k], the entries of -1 (None where there is none; they point at key 0)."""

    part: slice
    rows: Tensor
    flat: Tensor
    empty: Tensor | None


def selected_blocks(
    keys: Tensor, idx: Tensor, row_bytes: int, workspace: int, scratch: Scratch, block: int | None = None
) -> Iterator[Selected]:
    """Gathers keys [S, D] at idx [R, k] block by block; `row_bytes` is what the caller holds for one query row."""
    total, k = idx.shape
    least, most, budget = 1, total, workspace
    if keys.device.type == "cpu":
        (least, most), budget = BLOCK_ROWS, min(workspace, BLOCK_BYTES)
    step = block or max(1, min(max(least, budget // row_bytes), most, workspace // row_bytes))
    padded = (idx < 0).any(1).tolist()
    for start in range(0, total, step):
        part = slice(start, min(start + step, total))
        chosen, empty = idx[part], None
        if any(padded[part]):
            chosen, empty = chosen.clamp(min=0), chosen < 0
        flat = chosen.reshape(-1).long()  # index_add_ is 4x slower on int32
        rows = scratch("rows", *chosen.shape, keys.shape[1])
        torch.index_select(keys, 0, flat, out=rows.view(len(flat), -1))
        yield Selected(part, rows, flat, empty)


def _softmax_(logits: Tensor, scale: float, empty: Tensor | None) -> Tensor:
    """Turns logits [n, H, k] into softmax(scale * logits) over the real entries; returns its log-sum-exp [n, H].

    A row without entries becomes 0, with log-sum-exp -inf.
    """
    logits.mul_(scale)
    if empty is not None:
        logits.masked_fill_(empty.unsqueeze(1), -torch.inf)
    info = torch.finfo(logits.dtype)
    largest = logits.amax(-1, keepdim=True).clamp_(min=info.min)
    total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    logits.div_(total.clamp(min=info.tiny))
    return (largest + total.log()).squeeze(-1)


def forward(
    q: Tensor,
    kv: Tensor,
    idx: Tensor,
    scale: float,
    value_dim: int,
    workspace: int,
    target: bool = False,
    block: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q [R, H, D] absorbed queries, kv [S, D], idx [R, k] int32 -> out [R, H, C], lse [R, H] and, where `target` asks
    for it, the mean of the heads' probabilities [R, k]."""
    (rows, heads, dim), k = q.shape, idx.shape[1]
    out, lse = q.new_empty(rows, heads, value_dim), q.new_empty(rows, heads)
    mean = q.new_empty(rows, k) if target else None
    scratch = Scratch(q.dtype, q.device)
    row_bytes = q.itemsize * k * (dim + 2 * heads)
    for chosen in selected_blocks(kv, idx, row_bytes, workspace, scratch, block):
        part = chosen.part
        logits = torch.bmm(q[part], chosen.rows.transpose(1, 2), out=scratch("logits", len(chosen.rows), heads, k))
        lse[part] = _softmax_(logits, scale, chosen.empty)
        torch.bmm(logits, chosen.rows[..., :value_dim], out=out[part])
        if mean is not None:
            torch.mean(logits, 1, out=mean[part])
    return out, lse, mean


def backward(
    q: Tensor,
    kv: Tensor,
    idx: Tensor,
    out: Tensor,
    d_out: Tensor,
    scale: float,
    d_kv: Tensor,
    workspace: int,
    block: int | None = None,
) -> Tensor:
    """d_q [R, H, D]; d_kv [S, D] is added to in place, in the order of the rows: the same bits every time.

    The two products against the rows (q for the logits, d_out for d_p) run as one of 2H rows, and so do the two that
    make the rows' gradient: small products are what a CPU is slowest at.
    """
    (_, heads, dim), k, value_dim = q.shape, idx.shape[1], out.shape[2]
    d_q = torch.empty_like(q)
    scratch = Scratch(q.dtype, q.device)
    row_bytes = q.itemsize * k * (2 * dim + 4 * heads)
    for chosen in selected_blocks(kv, idx, row_bytes, workspace, scratch, block):
        part, n = chosen.part, len(chosen.rows)
        queries = scratch("queries", n, 2 * heads, dim)  # [d_out, 0; q] makes [d_p; logits]
        queries[:, :heads, :value_dim], queries[:, :heads, value_dim:] = d_out[part], 0.0
        queries[:, heads:] = q[part]
        products = torch.bmm(queries, chosen.rows.transpose(1, 2), out=scratch("products", n, 2 * heads, k))
        d_logits, p = products[:, :heads], products[:, heads:]
        _softmax_(p, scale, chosen.empty)
        delta = torch.linalg.vecdot(d_out[part], out[part]).unsqueeze(-1)
        d_logits.sub_(delta).mul_(p).mul_(scale)
        torch.bmm(d_logits, chosen.rows, out=d_q[part])
        queries[:, :heads] = q[part]  # [q; d_out, 0] meets [d_logits; p]
        queries[:, heads:, :value_dim], queries[:, heads:, value_dim:] = d_out[part], 0.0
        d_rows = torch.bmm(products.transpose(1, 2), queries, out=scratch("d_rows", n, k, dim))
        d_kv.index_add_(0, chosen.flat, d_rows.view(n * k, dim))
    return d_q
