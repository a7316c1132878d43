"""FP8 linears and grouped expert products on a GPU: cuBLAS's scaled blocks against their emulation, then timed beside
bf16. A part of bench/gpu.py, which runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.moe import grouped_linear
from model.ops.fp8_linear import fp8_grouped_linear, fp8_linear, has_block_scaled_mm

if TYPE_CHECKING:
    from bench.gpu import Runner

# The tensor cores' sums of 14 bits within a block of 128 (V3, 3.3.2) may round to the neighbour in bf16: 2^-7 at most
MAX_ERROR = 2**-7


def gradients(product: Any, x: Tensor, weight: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Output and both gradients of one linear."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = product(x, weight)
    out.backward(upstream)
    assert x.grad is not None and weight.grad is not None
    return {"output": out.detach(), "d_x": x.grad, "d_weight": weight.grad}


def check(mine: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    """Largest difference of each, relative to the largest entry."""
    found = {name: float((mine[name].float() - expected[name].float()).abs().max()) for name in mine}
    found = {name: error / float(expected[name].float().abs().max()) for name, error in found.items()}
    return {"ok": max(found.values()) <= MAX_ERROR, "max_error": found}


def linears(runner: Runner) -> None:
    """Rows for every (tokens, outputs, inputs) of the plan, and for its experts."""
    plan = runner.plan
    device = torch.device(plan.device)
    backend = "scaled_mm" if has_block_scaled_mm(device) else "emulate"
    draw = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=draw, device=device).to(dtype)

    for m, n, k in plan.linears:
        x, weight, upstream = randn(m, k), randn(n, k, dtype=torch.float32) * k**-0.5, randn(m, n)
        about: dict[str, Any] = {"M": m, "N": n, "K": k}
        work = 6 * m * n * k

        def fp8(x: Tensor, w: Tensor, how: str = backend) -> Tensor:
            return fp8_linear(x, w, power_of_two=True, backend=how)

        def compare(x: Tensor = x, w: Tensor = weight, upstream: Tensor = upstream) -> dict[str, Any]:
            emulated = gradients(lambda a, b: fp8(a, b, "emulate"), x, w, upstream)
            return check(gradients(fp8, x, w, upstream), emulated) | {"backend": backend}

        def bf16(x: Tensor, w: Tensor) -> Tensor:
            return F.linear(x, w.to(x.dtype))

        runner.row("check fp8_linear", compare, **about)
        for name, product in (("linear fp8", fp8), ("linear bf16", bf16)):

            def timed(product: Any = product, work: int = work, inputs: Any = (x, weight, upstream)) -> dict[str, Any]:
                return runner.timed(lambda: gradients(product, *inputs), work)

            runner.row(f"{name}, forward and backward", timed, **about)
    experts, m, n, k = plan.experts
    x, weight, upstream = randn(m, k), randn(experts, n, k, dtype=torch.float32) * k**-0.5, randn(m, n)
    counts = torch.randint(experts, (m,), generator=draw, device=device).bincount(minlength=experts)
    about = {"E": experts, "M": m, "N": n, "K": k}

    def loop(x: Tensor, w: Tensor) -> Tensor:
        parts = zip(x.split(counts.tolist()), w.to(x.dtype).unbind(), strict=True)
        return torch.cat([F.linear(part, each) for part, each in parts])

    def grouped(x: Tensor, w: Tensor) -> Tensor:
        return grouped_linear(x, counts, w.to(x.dtype))

    def grouped_fp8(x: Tensor, w: Tensor) -> Tensor:
        return fp8_grouped_linear(x, counts.tolist(), w, power_of_two=True, backend=backend)

    inputs = (x, weight, upstream)
    runner.row("check grouped_linear", lambda: check(gradients(grouped, *inputs), gradients(loop, *inputs)), **about)
    for name, product in (("experts grouped", grouped), ("experts loop", loop), ("experts fp8", grouped_fp8)):

        def timed_experts(product: Any = product) -> dict[str, Any]:
            return runner.timed(lambda: gradients(product, *inputs), 6 * m * n * k)

        runner.row(f"{name}, forward and backward", timed_experts, **about)
