"""RMSNorm and the gate with their own backward, against plain autograd on the definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.layers import MLP, RMSNorm, swiglu
from tests.model.ops.cases import assert_close, assert_same_gradients, randn


def norm(weight: torch.Tensor, eps: float) -> RMSNorm:
    made = RMSNorm(weight.shape[0], eps)
    made.weight = torch.nn.Parameter(weight)
    return made


def defined(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7)])
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_rms_norm(eps, shape, dtype):
    inputs = randn(0, shape, (7,), dtype=dtype)

    def mine(x, weight):
        return torch.func.functional_call(norm(weight.detach(), eps), {"weight": weight}, (x,))

    assert_close(mine(*inputs), defined(*inputs, eps))
    assert_same_gradients(mine, lambda *a: defined(*a, eps), inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_swiglu(dtype):
    inputs = randn(1, (6, 9), (6, 9), dtype=dtype)
    assert_close(swiglu(*inputs), F.silu(inputs[0]) * inputs[1])
    assert_same_gradients(swiglu, lambda gate, up: gate * torch.sigmoid(gate) * up, inputs)


def test_frozen_weights_have_no_gradient():
    layer, (x,) = norm(torch.ones(7), 1e-6), randn(2, (5, 7))
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad is not None


def test_under_autocast_the_mean_square_is_fp32():
    x = (randn(3, (4, 64))[0].detach() * 100).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = norm(torch.ones(64), 1e-6)(x)
    assert_close(found, defined(x.float(), torch.ones(64), 1e-6).bfloat16().float())


def test_what_is_kept_for_backward():
    """Inputs and one number a row: not the normalised rows, not silu(gate)."""
    x, gate, up = randn(4, (50, 8), (50, 8), (50, 8))
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        norm(torch.ones(8, dtype=torch.float64), 1e-6)(x)
        assert sorted(kept) == [(8,), (50, 1), (50, 8)]
        kept.clear()
        swiglu(gate, up)
        assert kept == [(50, 8), (50, 8)]


def test_mlp_is_down_of_silu_gate_times_up():
    mlp, (x,) = MLP(6, 10).double(), randn(5, (4, 6))
    gate, up, down = (layer.weight for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    assert_close(mlp(x), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T)
