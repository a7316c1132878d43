"""Block-scaled FP8 weights as DeepSeek stores them: e4m3 values, one scale for every 128x128 block.

`weight_scale_inv` holds what a stored value must be multiplied by (the inverse of the scale that quantised it). Edge
blocks are cut off where a dimension is no multiple of 128: a weight of 576 rows has 5 rows of scales, the last for 64
rows. Deriving the block from `rows // scale_rows` instead is wrong for exactly those.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


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
