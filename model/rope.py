"""Rotary position embedding with YaRN (arXiv 2309.00071) as DeepSeek-V3 uses it, in the two layouts the model needs.

MLA rotates interleaved pairs (x0, x1), (x2, x3), ...; the lightning indexer rotates half-split pairs (x0, x_{d/2}), ...
Mixing them up is silent while T <= index_topk. Tables are computed from positions at each forward, in fp32: no buffer
to lose on a meta-device build.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from conf.schema import RopeConfig


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(rope: RopeConfig, qk_head_dim: int) -> float:
    """MLA's logit scale: qk_head_dim^-0.5 * m^2 with m = 0.1 * mscale_all_dim * ln(factor) + 1 under YaRN."""
    m = _mscale(rope.factor, rope.mscale_all_dim) if rope.mscale_all_dim else 1.0
    return qk_head_dim**-0.5 * m * m


def inverse_frequencies(rope: RopeConfig, dim: int) -> Tensor:
    """[dim/2] fp32 angular frequencies; under YaRN low ones are interpolated by `factor`, high ones kept."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    extrapolated = 1.0 / rope.theta**exponents
    if rope.factor <= 1:
        return extrapolated

    def correction_dim(rotations: float) -> float:
        length = rope.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(correction_dim(rope.beta_fast)), 0)
    high = min(math.ceil(correction_dim(rope.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return extrapolated / rope.factor * ramp + extrapolated * (1 - ramp)


def rope_table(rope: RopeConfig, dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [..., dim/2] fp32 for `positions` [...]; YaRN's attention factor m(mscale)/m(mscale_all_dim)
    included."""
    angles = positions.float().unsqueeze(-1) * inverse_frequencies(rope, dim).to(positions.device)
    if rope.mscale and rope.mscale_all_dim:
        factor = _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    else:
        factor = _mscale(rope.factor, 1.0)
    return angles.cos() * factor, angles.sin() * factor


def _insert_heads(x: Tensor, table: Tensor) -> Tensor:
    return table.unsqueeze(-2) if x.dim() > table.dim() else table


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (x[2i], x[2i+1]) of x [..., (heads,) dim]; the result is laid out as [evens, odds], for queries and
    keys alike, which leaves every dot product as it is."""
    cos, sin = _insert_heads(x, cos), _insert_heads(x, sin)
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1).to(x.dtype)


def rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (x[i], x[i + dim/2]) of x [..., (heads,) dim]."""
    cos, sin = _insert_heads(x, cos), _insert_heads(x, sin)
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
