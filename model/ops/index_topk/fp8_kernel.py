"""The indexer's queries or keys made FP8 in one read: Hadamard transform, a power-of-two scale a row, e4m3.

Bit for bit `fp8.quantise(fp8.hadamard(x))`: the same sums of two in the same order. A row stays inside a warp, so the
transform costs exchanges between its threads and no memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8 import AMAX_FLOOR
from model.ops.fp8_linear.kernel import magnitude, scale_of, to_e4m3
from model.ops.index_topk.fp8 import CHANNELS

FLOOR = tl.constexpr(AMAX_FLOOR)


@triton.jit
def _transform(x, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """One step: channels `WIDTH` apart become their sum and their difference."""
    pairs = tl.reshape(x, (ROWS, DIM // (2 * WIDTH), 2, WIDTH))
    second = tl.arange(0, 2)[None, None, :, None] == 1
    total = tl.sum(pairs, axis=2, keep_dims=True)
    difference = tl.sum(tl.where(second, -pairs, pairs), axis=2, keep_dims=True)
    return tl.reshape(tl.where(second, difference, total), (ROWS, DIM))


@triton.jit(do_not_specialize=["num_rows"])  # fp8_linear/kernel.py says why
def _rotate_and_quantise(x, values, scales, num_rows, FACTOR: tl.constexpr, DIM: tl.constexpr, STEPS: tl.constexpr,
                         ROWS: tl.constexpr):  # fmt: skip
    row, channel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    real = row < num_rows
    place = row[:, None] * DIM + channel[None, :]
    numbers = tl.load(x + place, mask=real[:, None], other=0.0).to(tl.float32)
    for step in tl.static_range(STEPS):
        numbers = _transform(numbers, ROWS, DIM, 1 << step)
    numbers *= FACTOR
    scale = scale_of(tl.max(magnitude(numbers), axis=1), FLOOR, True)
    tl.store(values + place, to_e4m3(numbers, scale[:, None], True), mask=real[:, None])
    tl.store(scales + row, scale, mask=real)


def rotate_and_quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., d] bf16, fp16 or fp32, d a power of two up to 128 -> e4m3 [..., d] and its fp32 scale [...]."""
    dim = x.shape[-1]
    assert dim & (dim - 1) == 0 and dim <= CHANNELS, dim  # fp8.py says so to the user
    x = x.contiguous()
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows = scales.numel()
    if rows:
        _rotate_and_quantise[(triton.cdiv(rows, 32),)](
            x, values, scales, rows, dim**-0.5, dim, dim.bit_length() - 1, 32, num_warps=4
        )
    return values, scales
