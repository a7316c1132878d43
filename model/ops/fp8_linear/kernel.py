"""Operands of cuBLAS's block-scaled product in one launch each: read, scaled, rounded to e4m3 and laid out (README.md).

Bit for bit what `op.quantise` gives, zero-padded as cuBLAS wants it. A program owns a tile of 128 x 128: it has whole
tiles of 1 x 128 in both orientations, so one read can serve both, and a whole block of a weight. Tokens of several
experts lie one expert after the other; a table says of every tile whose tokens it holds.

The largest magnitude is found on the bits without the sign: as whole numbers they are in the order of the numbers, with
inf and then NaN above all.

No kernel may know while it is compiled that part of a tile is padding, as Triton would tell it of a size of 1: where
two pairs of numbers are the same constant, ptxas 12.8 (Triton 3.6 and 3.7) packs the second pair beside whatever its
register held instead of beside the first. So row counts are not specialised, and one column becomes two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from model.fp8 import BLOCK, E4M3_MAX
from model.ops.fp8_linear import op

ROWS = 16  # that cuBLAS wants an operand's rows to be a multiple of
LARGEST = tl.constexpr(E4M3_MAX)
AMAX_LEAST = tl.constexpr(op.AMAX_LEAST)
INFINITE = tl.constexpr(0x7F800000)  # fp32's bits
TILE = tl.constexpr(BLOCK)


class Operand(NamedTuple):
    """e4m3 [R, C] and its scales, strided as cuBLAS reads them: [R, C / 128] for tiles of 1 x 128; for blocks of 128 x
    128 [C / 128 rounded up to fours, R / 128], as of the transpose, which is what a weight is multiplied as."""

    values: Tensor
    scale: Tensor


@triton.jit
def magnitude(x):
    """fp32 -> the bits of |x| as int32."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(amax, least, POWER_OF_TWO: tl.constexpr):
    """Bits of the largest magnitude, taken as at least `least` -> what the rounded numbers are multiplied by."""
    scale = tl.div_rn(tl.maximum(amax.to(tl.float32, bitcast=True), least), LARGEST)
    if POWER_OF_TWO:  # rounded up: the exponent grows by one unless the mantissa is 0
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & INFINITE).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def block_scale(amax, POWER_OF_TWO: tl.constexpr):
    """1 for a block of zeros; inf or NaN for a block that holds one: scaled back it is NaN throughout."""
    scale = tl.where(amax == 0, 1.0, scale_of(amax, AMAX_LEAST, POWER_OF_TWO))
    return tl.where(amax < INFINITE, scale, amax.to(tl.float32, bitcast=True))


@triton.jit
def to_e4m3(x, scale, POWER_OF_TWO: tl.constexpr):
    if POWER_OF_TWO:  # a product with the reciprocal is then exact, and a division is not cheap
        return (x * tl.div_rn(1.0, scale)).to(tl.float8e4nv)
    return tl.div_rn(x, scale).to(tl.float8e4nv)


@triton.jit(do_not_specialize=["num_rows"])
def _activations(x, table, rows8, rows_scale, columns8, columns_scale, num_rows, num_columns, stride,
                 BY_ROWS: tl.constexpr, BY_COLUMNS: tl.constexpr, POWER_OF_TWO: tl.constexpr):  # fmt: skip
    """`table`: int32 [tiles, 5], see `_table`; None: one group of `num_rows`."""
    tile = tl.program_id(1)
    if table is None:
        source, count, inside, row_start, token_start = 0, num_rows, tile * TILE, 0, 0
    else:
        entry = table + tile * 5
        source, count = tl.load(entry), tl.load(entry + 1)
        inside = tl.multiple_of(tl.load(entry + 2), 128)  # said, so that stores are 16 bytes wide
        row_start, token_start = tl.multiple_of(tl.load(entry + 3), 16), tl.multiple_of(tl.load(entry + 4), 128)
    # Of a place in memory, what is the tile's is 64 bits wide, and what is inside the tile 32: half the registers.
    r, c = tl.arange(0, TILE), tl.arange(0, TILE)
    first_column = tl.program_id(0) * TILE
    x += tl.cast(source + inside, tl.int64) * stride + first_column
    mask = (r < count - inside)[:, None] & (c < num_columns - first_column)[None, :]
    place = r[:, None] * stride + c[None, :]
    if BY_ROWS:
        numbers = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        width, real = tl.num_programs(0) * TILE, tl.cdiv(count, 16) * 16
        scale = block_scale(tl.max(magnitude(numbers), axis=1), POWER_OF_TWO)
        rounded = to_e4m3(numbers, scale[:, None], POWER_OF_TWO)
        rows8 += tl.cast(row_start + inside, tl.int64) * width + first_column
        tl.store(rows8 + r[:, None] * width + c[None, :], rounded, mask=(r < real - inside)[:, None])
        rows_scale += tl.cast(row_start, tl.int64) * tl.num_programs(0) + tl.cast(tl.program_id(0), tl.int64) * real
        tl.store(rows_scale + inside + r, scale, mask=r < real - inside)
    if BY_COLUMNS:  # the tile is read again, from the cache: held meanwhile, it would leave room for one program alone
        numbers = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        width, real = tl.cdiv(count, TILE) * TILE, tl.cdiv(num_columns, 16) * 16
        scale = block_scale(tl.max(magnitude(numbers), axis=0), POWER_OF_TWO)
        rounded = tl.trans(to_e4m3(numbers, scale[None, :], POWER_OF_TWO))
        columns8 += tl.cast(token_start, tl.int64) * real + tl.cast(first_column, tl.int64) * width + inside
        tl.store(columns8 + c[:, None] * width + r[None, :], rounded, mask=(c < real - first_column)[:, None])
        columns_scale += tl.cast((token_start + inside) // TILE, tl.int64) * real + first_column
        tl.store(columns_scale + c, scale, mask=c < real - first_column)


@triton.jit(do_not_specialize=["num_rows"])
def _weights(weight, values, scales, num_rows, num_columns, matrix_stride, row_stride,
             TRANSPOSED: tl.constexpr, POWER_OF_TWO: tl.constexpr):  # fmt: skip
    """One block of one matrix; `values` and `scales` are written in the orientation asked for."""
    matrix = tl.program_id(2).to(tl.int64)
    blocks_across, blocks_down = tl.num_programs(0), tl.num_programs(1)
    first_row, first_column = tl.program_id(1) * TILE, tl.program_id(0) * TILE
    r, c = tl.arange(0, TILE), tl.arange(0, TILE)
    mask = (r < num_rows - first_row)[:, None] & (c < num_columns - first_column)[None, :]
    weight += matrix * matrix_stride + tl.cast(first_row, tl.int64) * row_stride + first_column
    numbers = tl.load(weight + r[:, None] * row_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = block_scale(tl.max(magnitude(numbers)), POWER_OF_TWO)
    rounded = to_e4m3(numbers, scale, POWER_OF_TWO)
    values += matrix * blocks_across * blocks_down * TILE * TILE
    if TRANSPOSED:
        width = blocks_down * TILE
        values += tl.cast(first_column, tl.int64) * width + first_row
        tl.store(values + c[:, None] * width + r[None, :], tl.trans(rounded))
        row_length = tl.cdiv(blocks_down, 4) * 4
        tl.store(scales + (matrix * blocks_across + tl.program_id(0)) * row_length + tl.program_id(1), scale)
    else:
        width = blocks_across * TILE
        values += tl.cast(first_row, tl.int64) * width + first_column
        tl.store(values + r[:, None] * width + c[None, :], rounded)
        row_length = tl.cdiv(blocks_across, 4) * 4
        tl.store(scales + (matrix * blocks_down + tl.program_id(1)) * row_length + tl.program_id(0), scale)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _starts(counts: list[int], multiple: int) -> list[int]:
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + _up(count, multiple))
    return starts


def _readable(x: Tensor) -> Tensor:
    """x with its last dimension contiguous and at least 2 long, zeros behind."""
    x = F.pad(x, (0, 1)) if x.shape[-1] == 1 else x
    return x if x.stride(-1) == 1 else x.contiguous()


def _table(counts: list[int], device: torch.device) -> Tensor:
    """Of every tile of 128 tokens: its group's first row and their number, the tile's first among them, and where the
    group starts among rows padded to 16 and to 128. int32 [tiles, 5]."""
    firsts, rows, tokens = (_starts(counts, multiple) for multiple in (1, ROWS, BLOCK))
    entries = [
        (firsts[e], count, inside, rows[e], tokens[e])
        for e, count in enumerate(counts)
        for inside in range(0, count, BLOCK)
    ]
    return torch.tensor(entries, dtype=torch.int32).to(device)


def activations(
    x: Tensor, counts: list[int], power_of_two: bool, by_rows: bool = False, by_columns: bool = False
) -> tuple[list[Operand], list[Operand]]:
    """Tiles of 1 x 128 of x [M, C], whose rows are groups of `counts`: along the columns, and along the tokens.

    Returns, for every group of n rows, operands [n up to 16s, C up to 128s] if `by_rows`, and of the group's transpose
    [C up to 16s, n up to 128s] if `by_columns`; otherwise empty lists.
    """
    columns, device = x.shape[1], x.device
    blocks = triton.cdiv(columns, BLOCK)
    rows, tokens = _starts(counts, ROWS), _starts(counts, BLOCK)
    byte, wide = torch.float8_e4m3fn, _up(columns, ROWS)
    row_values = torch.empty(rows[-1] * blocks * BLOCK if by_rows else 0, dtype=byte, device=device)
    row_scales = torch.empty(rows[-1] * blocks if by_rows else 0, device=device)
    column_values = torch.empty(tokens[-1] * wide if by_columns else 0, dtype=byte, device=device)
    column_scales = torch.empty(tokens[-1] // BLOCK * wide if by_columns else 0, device=device)
    if tokens[-1] and blocks:
        table = None if len(counts) == 1 else _table(counts, device)
        x = _readable(x)
        _activations[(blocks, tokens[-1] // BLOCK)](
            x, table, row_values, row_scales, column_values, column_scales, *x.shape, x.stride(0),
            by_rows, by_columns, power_of_two, num_warps=8, maxnreg=128,
        )  # fmt: skip
    along_columns, along_tokens = [], []
    if by_rows:
        for start, stop in zip(rows, rows[1:], strict=False):
            values = row_values[start * blocks * BLOCK : stop * blocks * BLOCK].view(stop - start, blocks * BLOCK)
            along_columns.append(
                Operand(values, row_scales[start * blocks : stop * blocks].view(blocks, stop - start).T)
            )
    if by_columns:
        for start, stop in zip(tokens, tokens[1:], strict=False):
            scale = column_scales[start // BLOCK * wide : stop // BLOCK * wide].view((stop - start) // BLOCK, wide).T
            along_tokens.append(Operand(column_values[start * wide : stop * wide].view(wide, stop - start), scale))
    return along_columns, along_tokens


def weights(weight: Tensor, power_of_two: bool, transposed: bool = False) -> list[Operand]:
    """Blocks of 128 x 128 of weight [E, N, K] -> E operands [N, K], or [K, N] if `transposed`, both up to 128s."""
    weight = _readable(weight)
    (matrices, num_rows, num_columns), device = weight.shape, weight.device
    down, across = triton.cdiv(num_rows, BLOCK), triton.cdiv(num_columns, BLOCK)
    rows, columns = (across, down) if transposed else (down, across)
    values = torch.empty(matrices, rows * BLOCK, columns * BLOCK, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.zeros(matrices, rows, _up(columns, 4), device=device)
    if weight.numel():
        _weights[(across, down, matrices)](
            weight, values, scales, num_rows, num_columns, weight.stride(0), weight.stride(1), transposed, power_of_two,
            num_warps=8,
        )  # fmt: skip
    return [Operand(value, scale.T) for value, scale in zip(values, scales, strict=True)]
