"""FP8 scoring of the indexer, as DeepSeek-V3.2 infers: Hadamard transform, then e4m3 with one power-of-two scale a row.

The transform is orthogonal: it changes no product and spreads outliers over the channels before rounding. Since the
scales are powers of two and positive, q's may be folded into w and k's multiplied after the head sum, or both into the
rounded values: the same bits either way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.fp8 import AMAX_FLOOR, power_of_two_scale

CHANNELS = 128  # that share a scale


def hadamard(x: Tensor) -> Tensor:
    """x [..., d] times the d x d Sylvester-Hadamard matrix and d^-0.5; d a power of two (ValueError otherwise)."""
    d = x.shape[-1]
    if d & (d - 1):
        raise ValueError(f"the Hadamard transform needs a width that is a power of two, got {d}")
    shape, width = x.shape, 1
    while width < d:
        pairs = x.reshape(-1, d // (2 * width), 2, width)
        x = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2)
        width *= 2
    return x.reshape(shape) * d**-0.5


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., d] -> e4m3 [..., d] and its fp32 scale [...], the smallest power of two that fits the row's amax.

    One scale covers the row: index heads are at most 128 wide (ValueError otherwise).
    """
    if x.shape[-1] > CHANNELS:
        raise ValueError(f"one FP8 scale covers {CHANNELS} channels, got a width of {x.shape[-1]}")
    amax = x.abs().amax(-1).clamp(min=AMAX_FLOOR).float()
    scale = power_of_two_scale(amax)
    return (x / scale.unsqueeze(-1).to(x.dtype)).to(torch.float8_e4m3fn), scale


def rounded(x: Tensor) -> Tensor:
    """What FP8 leaves of x [..., d], in x's own dtype and in the transformed basis."""
    values, scale = quantise(hadamard(x))
    return values.to(x.dtype) * scale.unsqueeze(-1).to(x.dtype)
