"""Linear layers whose three products run in FP8 (DeepSeek-V3 report, sec. 3.3): e4m3 everywhere, fp32 accumulation.

Activations and gradients carry one scale for every 128 numbers along the dimension that the product sums over, weights
one for every 128 x 128 block. Every product is `a @ b.T` of two operands quantised along their columns:

    forward  x [M, K]       weight [N, K]       1x128 by 128x128
    dgrad    grad [M, N]    weight.T [K, N]     1x128 by 128x128; the same blocks, transposed
    wgrad    grad.T [N, M]  x.T [K, M]          1x128 by 1x128, along the tokens

`emulate` rounds to float8_e4m3fn, scales back and multiplies in fp32, on any device. `scaled_mm` is cuBLAS's product of
scaled blocks, on Hopper alone.
Departures: x is kept in its own precision and quantised twice, once for each orientation, where V3 keeps the forward's
e4m3 and quantises that again; scales are powers of two only if asked for (V3: for some layers; V3.1 and later: all).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.fp8 import BLOCK, E4M3_MAX, power_of_two_scale
from model.ops.common import no_autocast

ROWS = 16  # that cuBLAS wants an operand's rows to be a multiple of
AMAX_LEAST = E4M3_MAX * torch.finfo(torch.float32).tiny  # below it the scale would be subnormal, or 0
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantise(x: Tensor, rows: int, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """x [R, C] -> e4m3 [R', C'], zero-padded to whole blocks of rows x 128, and fp32 scales [R' / rows, C' / 128].

    A block of zeros has scale 1. One that holds NaN or inf has that as its scale: scaled back, it is NaN throughout.
    """
    padded = F.pad(x.float(), (0, -x.shape[1] % BLOCK, 0, -x.shape[0] % rows)).contiguous()
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // BLOCK, BLOCK)
    amax = blocks.abs().amax((1, 3))
    least = amax.clamp(min=AMAX_LEAST)
    scale = power_of_two_scale(least) if power_of_two else least / E4M3_MAX
    scale = scale.where(amax.isfinite(), amax).masked_fill(amax == 0, 1.0)
    # with this scale the clamp never bites; without it a slip above 464 would be NaN or 448, as torch's version has it
    values = (blocks / scale[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return values.view(padded.shape), scale


def rounded(x: Tensor, rows: int, power_of_two: bool = False) -> Tensor:
    """What FP8 leaves of x [R, C], in fp32, with one scale for every block of rows x 128."""
    values, scale = quantise(x, rows, power_of_two)
    blocks = values.float().view(scale.shape[0], rows, scale.shape[1], BLOCK).mul_(scale[:, None, :, None])
    return blocks.view(values.shape)[: x.shape[0], : x.shape[1]]


def _columns_first(scale: Tensor, multiple: int = 1) -> Tensor:
    """scale [R, C] with strides (1, R), as cuBLAS reads scales; R zero-padded to a multiple."""
    rows, columns = scale.shape
    laid_out = scale.new_zeros(columns, rows + -rows % multiple)
    laid_out[:, :rows] = scale.T
    return laid_out.T


def _scaled_mm(a: Tensor, b: Tensor, b_rows: int, power_of_two: bool, dtype: torch.dtype) -> Tensor:
    """Operands are zero-padded: the dimension summed over and the weight's rows to 128, other rows to 16."""
    m, n = a.shape[0], b.shape[0]
    recipe = F.ScalingType.BlockWise1x128 if b_rows == 1 else F.ScalingType.BlockWise128x128
    a8, a_scale = quantise(F.pad(a, (0, 0, 0, -m % ROWS)), 1, power_of_two)
    b8, b_scale = quantise(F.pad(b, (0, 0, 0, -n % ROWS)), b_rows, power_of_two)
    # a 1x128 scale stands at [row, block]; one of 128x128 at [block summed over, block of rows], in fours of the former
    b_scale = _columns_first(b_scale) if b_rows == 1 else _columns_first(b_scale.T, 4)
    one = F.ScalingType.BlockWise1x128
    return F.scaled_mm(a8, b8.T, _columns_first(a_scale), one, b_scale, recipe, output_dtype=dtype)[:m, :n]


def _product(a: Tensor, b: Tensor, b_rows: int, power_of_two: bool, backend: str, dtype: torch.dtype) -> Tensor:
    """a [M, C] in tiles of 1 x 128, b [N, C] in blocks of b_rows x 128 -> a @ b.T [M, N] in `dtype`."""
    if backend == "scaled_mm" and a.numel() and b.numel():
        return _scaled_mm(a, b, b_rows, power_of_two, dtype)
    return (rounded(a, 1, power_of_two) @ rounded(b, b_rows, power_of_two).T).to(dtype)


class _GroupedLinear(torch.autograd.Function):
    """x [M, K] in groups of `counts` rows, weight [E, N, K] or, of a single group, [N, K]. The weight is saved as it
    came: a view of it would keep alive what an engine that shards parameters wants to free."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, counts: list[int], power_of_two: bool, backend: str):
        ctx.save_for_backward(x, weight)
        ctx.counts, ctx.power_of_two, ctx.backend = counts, power_of_two, backend
        y = x.new_empty(x.shape[0], weight.shape[-2])
        with no_autocast(x):
            for x_e, w, out in zip(x.split(counts), _experts(weight), y.split(counts), strict=True):
                out.copy_(_product(x_e, w, BLOCK, power_of_two, backend, y.dtype))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grads = grad.split(ctx.counts)
        d_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        with no_autocast(grad):
            if d_x is not None:
                for g, w, out in zip(grads, _experts(weight), d_x.split(ctx.counts), strict=True):
                    out.copy_(_product(g, w.T, BLOCK, ctx.power_of_two, ctx.backend, x.dtype))
            if d_weight is not None:
                for g, x_e, out in zip(grads, x.split(ctx.counts), _experts(d_weight), strict=True):
                    out.copy_(_product(g.T, x_e.T, 1, ctx.power_of_two, ctx.backend, weight.dtype))
        return d_x, d_weight, None, None, None


def _experts(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.unbind() if weight.dim() == 3 else (weight,)


def has_block_scaled_mm(device: torch.device) -> bool:
    """cuBLAS scales blocks on compute capability 9.x and on no other, newer ones included."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _run(x: Tensor, weight: Tensor, counts: list[int], power_of_two: bool, backend: str | None) -> Tensor:
    if x.dtype not in DTYPES:
        raise ValueError(f"fp8_linear takes x in bf16, fp16 or fp32, got {x.dtype}: cast it first")
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"x {list(x.shape)} and weight {list(weight.shape)} differ in their last dimension")
    if backend is None:
        backend = "scaled_mm" if has_block_scaled_mm(x.device) else "emulate"
    elif backend not in ("emulate", "scaled_mm"):
        raise ValueError(f"backend {backend!r} is neither 'emulate' nor 'scaled_mm'")
    elif backend == "scaled_mm" and not has_block_scaled_mm(x.device):
        raise ValueError(
            f"backend 'scaled_mm' needs a GPU of compute capability 9.x, x is on {x.device}: use 'emulate'"
        )
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return _GroupedLinear.apply(x, weight, counts, power_of_two, backend)


def fp8_linear(x: Tensor, weight: Tensor, power_of_two: bool = False, backend: str | None = None) -> Tensor:
    """x @ weight.T, forward and both gradients in block-scaled FP8.

    Args: x [..., K] bf16, fp16 or fp32; weight [N, K], the master copy, quantised on the fly; power_of_two: scales are
        rounded up to powers of two; backend: emulate | scaled_mm (default: scaled_mm where the device has it).
    Returns: [..., N] in x's dtype, under autocast in autocast's (x is cast to it first, the weight is not). No
        dimension need divide by 128. NaN and inf reach every output that their block has a part in, as NaN.
    Raises ValueError for another dtype, shapes that do not match, and a backend that the device has not.
    """
    rows = x.reshape(-1, x.shape[-1])
    return _run(rows, weight, [rows.shape[0]], power_of_two, backend).view(*x.shape[:-1], weight.shape[0])


def fp8_grouped_linear(
    x: Tensor, counts: list[int], weight: Tensor, power_of_two: bool = False, backend: str | None = None
) -> Tensor:
    """x [M, K] sorted by expert, counts: rows of each of E experts (0 allowed), weight [E, N, K] -> [M, N].

    As `fp8_linear` of every expert by itself: the tiles of the weight's gradient run along the expert's own tokens.
    Raises ValueError as `fp8_linear` does, and where counts are not E numbers that add up to M.
    """
    if len(counts) != weight.shape[0] or sum(counts) != x.shape[0]:
        raise ValueError(f"counts {counts} do not divide {x.shape[0]} rows among {weight.shape[0]} experts")
    return _run(x, weight, counts, power_of_two, backend)


class _RoundWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, power_of_two: bool):
        return rounded(weight, BLOCK, power_of_two).to(weight.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def fp8_round_weight(weight: Tensor, power_of_two: bool = False) -> Tensor:
    """weight [N, K] -> what 128 x 128 blocks of e4m3 leave of it, in its dtype; the gradient passes unchanged.

    For callers that multiply by the weight themselves, as absorbed MLA does.
    """
    return _RoundWeight.apply(weight, power_of_two)
