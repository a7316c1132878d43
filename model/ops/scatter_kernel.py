"""Adds rows into a table by index with a fixed order of addition (a Triton kernel; torch's index_add_ uses atomics).

The deterministic form of the sparse backward passes writes one gradient row for every selected (query, slot) and sums
them here. A stable sort brings the rows of one key together in ascending order; one program adds them up, so the
result is the same bit for bit in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _segment_sum(rows, order, starts, into, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    key = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, BLOCK_ROWS)
    start, stop = tl.load(starts + key), tl.load(starts + key + 1)
    if start < stop:
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(start, stop, BLOCK_ROWS):
            real = first + row < stop
            source = tl.load(order + first + row, mask=real, other=0)  # int64: rows * WIDTH may pass 2^31
            mask = real[:, None] & (column < WIDTH)[None, :]
            total += tl.sum(tl.load(rows + source[:, None] * WIDTH + column[None, :], mask=mask, other=0.0), axis=0)
        target = into + key.to(tl.int64) * WIDTH + column
        tl.store(target, tl.load(target, mask=column < WIDTH) + total, mask=column < WIDTH)


def segment_sum(rows: Tensor, idx: Tensor, into: Tensor) -> None:
    """into[idx[n]] += rows[n] for every n with idx[n] >= 0, in an order that depends on `idx` alone.

    Args: rows fp32 [N, D], idx int32 [N] (-1: skipped; its row is not read), into fp32 [S, D], changed in place.
    """
    assert rows.is_contiguous() and into.is_contiguous() and rows.shape[1] == into.shape[1]
    num_keys, width = into.shape
    sorted_idx, order = torch.sort(idx, stable=True)
    starts = torch.searchsorted(sorted_idx, torch.arange(num_keys + 1, dtype=idx.dtype, device=idx.device))
    block = min(1024, triton.next_power_of_2(width))
    grid = (num_keys, triton.cdiv(width, block))
    _segment_sum[grid](rows, order, starts, into, WIDTH=width, BLOCK_ROWS=8, BLOCK=block, num_warps=4)
