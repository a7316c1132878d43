"""Block-scaled FP8 weights as DeepSeek stores them: e4m3 values, one scale for every 128x128 block.

`weight_scale_inv` holds what a stored value must be multiplied by (the inverse of the scale that quantised it). Edge
blocks are cut off where a dimension is no multiple of 128: a weight of 576 rows has 5 rows of scales, the last for 64
rows. Deriving the block from `rows // scale_rows` instead is wrong for exactly those.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4  # of a block, as DeepSeek's own quantiser has it: a block of zeros has a finite scale


def over_largest(amax: Tensor) -> Tensor:
    """amax / 448, rounded once on every device: on a GPU torch multiplies by the reciprocal of a divisor that is no
    tensor, and a scale that is off in its last bit moves the ties of bf16 numbers, which are many."""
    return amax / torch.full((), E4M3_MAX, dtype=amax.dtype, device=amax.device)


def power_of_two_scale(amax: Tensor) -> Tensor:
    """The smallest power of two that brings `amax` (fp32, positive) into e4m3's range: "ue8m0" scales, exactly."""
    mantissa, exponent = torch.frexp(over_largest(amax))  # mantissa in [0.5, 1): a power of two already iff it is 0.5
    return torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [R, C] -> e4m3 [R, C] and fp32 scales [ceil(R/128), ceil(C/128)], powers of two as in V3.1 and V3.2.

    Reading and writing again loses nothing: `dequantize` of what it gave back, quantised again, is the same number for
    number. (A block whose largest value rounds to 224, half the range, then has half the scale.)
    """
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(scale_shape(tuple(weight.shape)))
    for rows, target, scale in zip(weight.split(BLOCK), stored.split(BLOCK), scales, strict=True):
        wide = rows.to(torch.float32)
        amax = torch.stack([block.abs().max() for block in wide.split(BLOCK, 1)]).clamp_(min=AMAX_FLOOR)
        scale.copy_(power_of_two_scale(amax))
        target.copy_(wide / scale.repeat_interleave(BLOCK)[: wide.shape[1]])
    return stored, scales


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of `weight_scale_inv` for a weight [rows, columns]: blocks rounded up."""
    return tuple(-(-size // BLOCK) for size in shape)


def dequantize(weight: Tensor, scale_inv: Tensor) -> Tensor:
    """weight [R, C] float8_e4m3fn, scale_inv [ceil(R/128), ceil(C/128)] -> fp32 [R, C].

    Raises ValueError if the scales do not cover the weight.
    """
    if scale_inv.shape != scale_shape(tuple(weight.shape)):
        raise ValueError(
            f"scales {list(scale_inv.shape)} do not cover a weight {list(weight.shape)} in blocks of {BLOCK}"
        )
    columns = scale_inv.to(torch.float32).repeat_interleave(BLOCK, 1)[:, : weight.shape[1]]
    wide = weight.to(torch.float32)
    # in place and a block row at a time: no second array of the weight's size
    for rows, scale in zip(wide.split(BLOCK), columns, strict=True):
        rows.mul_(scale)
    return wide
