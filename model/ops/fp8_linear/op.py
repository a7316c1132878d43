"""Linear layers whose three products run in FP8 (DeepSeek-V3 report, sec. 3.3): e4m3 everywhere, fp32 accumulation.

Activations and gradients carry one scale for every 128 numbers along the dimension that the product sums over, weights
one for every 128 x 128 block. Every product is `a @ b.T` of two operands quantised along their columns:

    forward  x [M, K]       weight [N, K]       1x128 by 128x128
    dgrad    grad [M, N]    weight.T [K, N]     1x128 by 128x128; the same blocks, transposed
    wgrad    grad.T [N, M]  x.T [K, M]          1x128 by 1x128, along the tokens

`emulate` rounds to float8_e4m3fn, scales back and multiplies in fp32, on any device. `scaled_mm` is cuBLAS's product of
scaled blocks, on Hopper alone; `kernel.py` makes its operands.
Departures: x is kept in its own precision and quantised twice, once for each orientation, where V3 keeps the forward's
e4m3 and quantises that again; scales are powers of two only if asked for (V3: for some layers; V3.1 and later: all).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.fp8 import BLOCK, E4M3_MAX, over_largest, power_of_two_scale
from model.ops.common import no_autocast

if TYPE_CHECKING:
    from model.ops.fp8_linear.kernel import Operand

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
    scale = power_of_two_scale(least) if power_of_two else over_largest(least)
    scale = scale.where(amax.isfinite(), amax).masked_fill(amax == 0, 1.0)
    # with this scale the clamp never bites; without it a slip above 464 would be NaN or 448, as torch's version has it
    values = (blocks / scale[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return values.view(padded.shape), scale


def rounded(x: Tensor, rows: int, power_of_two: bool = False) -> Tensor:
    """What FP8 leaves of x [R, C], in fp32, with one scale for every block of rows x 128."""
    values, scale = quantise(x, rows, power_of_two)
    blocks = values.float().view(scale.shape[0], rows, scale.shape[1], BLOCK).mul_(scale[:, None, :, None])
    return blocks.view(values.shape)[: x.shape[0], : x.shape[1]]


@dataclass(frozen=True)
class _Emulated:
    """The three products of groups of tokens, in fp32 on rounded operands; generators of one product a group."""

    counts: list[int]
    power_of_two: bool

    def product(self, a: Tensor, b: Tensor, b_rows: int, dtype: torch.dtype) -> Tensor:
        """a [M, C] in tiles of 1 x 128, b [N, C] in blocks of b_rows x 128 -> a @ b.T [M, N]."""
        return (rounded(a, 1, self.power_of_two) @ rounded(b, b_rows, self.power_of_two).T).to(dtype)

    def forward(self, x: Tensor, weight: Tensor) -> Iterator[Tensor]:
        pairs = zip(x.split(self.counts), weight, strict=True)
        return (self.product(x_e, w, BLOCK, x.dtype) for x_e, w in pairs)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, d_x: bool, d_weight: bool
    ) -> tuple[Iterator[Tensor] | None, Iterator[Tensor] | None]:
        """-> d x and d weight, None for one that is not needed."""
        grads, parts = grad.split(self.counts), x.split(self.counts)
        pairs, sides = zip(grads, weight, strict=True), zip(grads, parts, strict=True)
        return (
            (self.product(g, w.T, BLOCK, x.dtype) for g, w in pairs) if d_x else None,
            (self.product(g.T, x_e.T, 1, weight.dtype) for g, x_e in sides) if d_weight else None,
        )


@dataclass(frozen=True)
class _ScaledMM:
    """The same by cuBLAS: operands of all groups in one launch, then a product a group, as it has no grouped form."""

    counts: list[int]
    power_of_two: bool

    def multiply(
        self, left: list[Operand], right: list[Operand], b_rows: int, m: list[int], n: int, like: Tensor
    ) -> Iterator[Tensor]:
        """[m, n] of each group in `like`'s dtype, the operands' padding cut off."""
        one = F.ScalingType.BlockWise1x128
        recipe = one if b_rows == 1 else F.ScalingType.BlockWise128x128
        for a, b, rows in zip(left, right, m, strict=True):
            if not (a.values.numel() and b.values.numel()):
                yield like.new_zeros(rows, n)
                continue
            found = F.scaled_mm(a.values, b.values.T, a.scale, one, b.scale, recipe, output_dtype=like.dtype)
            yield found[:rows, :n]

    def forward(self, x: Tensor, weight: Tensor) -> Iterator[Tensor]:
        from model.ops.fp8_linear import kernel

        left, _ = kernel.activations(x, self.counts, self.power_of_two, by_rows=True)
        right = kernel.weights(weight, self.power_of_two)
        return self.multiply(left, right, BLOCK, self.counts, weight.shape[1], x)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, d_x: bool, d_weight: bool
    ) -> tuple[Iterator[Tensor] | None, Iterator[Tensor] | None]:
        from model.ops.fp8_linear import kernel

        rows, columns = kernel.activations(grad, self.counts, self.power_of_two, by_rows=d_x, by_columns=d_weight)
        found_x = found_weight = None
        (outputs, inputs), groups = weight.shape[1:], len(self.counts)
        if d_x:
            right = kernel.weights(weight, self.power_of_two, transposed=True)
            found_x = self.multiply(rows, right, BLOCK, self.counts, inputs, x)
        if d_weight:
            _, tokens = kernel.activations(x, self.counts, self.power_of_two, by_columns=True)
            found_weight = self.multiply(columns, tokens, 1, [outputs] * groups, inputs, weight)
        return found_x, found_weight


def _together(
    products: Iterator[Tensor], parts: Callable[[Tensor], Sequence[Tensor]], groups: int, like: Tensor, *shape: int
) -> Tensor:
    """The groups' products as one tensor of `shape`, cut by `parts`; that of a single group as it came."""
    if groups == 1:
        return next(products).contiguous().view(shape)
    result = like.new_empty(shape)
    for product, part in zip(products, parts(result), strict=True):
        part.copy_(product)
    return result


class _GroupedLinear(torch.autograd.Function):
    """x [M, K] in groups of `counts` rows, weight [E, N, K] or, of a single group, [N, K]. The weight is saved as it
    came: a view of it would keep alive what an engine that shards parameters wants to free."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, counts: list[int], power_of_two: bool, backend: str):
        ctx.save_for_backward(x, weight)
        ctx.products = (_ScaledMM if backend == "scaled_mm" else _Emulated)(counts, power_of_two)
        with no_autocast(x):
            products = ctx.products.forward(x, _matrices(weight))
            return _together(products, lambda y: y.split(counts), len(counts), x, x.shape[0], weight.shape[-2])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        d_x = d_weight = None
        counts = ctx.products.counts
        with no_autocast(grad):
            of_x, of_weight = ctx.products.backward(grad, x, _matrices(weight), *ctx.needs_input_grad[:2])
            if of_x is not None:
                d_x = _together(of_x, lambda t: t.split(counts), len(counts), x, *x.shape)
            if of_weight is not None:
                d_weight = _together(of_weight, lambda t: t.unbind(), len(counts), weight, *weight.shape)
        return d_x, d_weight, None, None, None


def _matrices(weight: Tensor) -> Tensor:
    """[E, N, K], of a single group with E = 1."""
    return weight if weight.dim() == 3 else weight.unsqueeze(0)


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
