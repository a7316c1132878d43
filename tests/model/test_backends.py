"""The whole model on the Triton kernels (in the interpreter, without a GPU) against plain torch: every output and every
gradient of the four ways a step may run, packed and past index_topk. What torch's conformance tests show, this carries
over to Triton.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model.ops.settings import OpSettings
from tests.model.test_transformer import MODES, total_loss
from tests.model.tiny import CONFIG, batch, tiny_net

TOLERANCE = 2e-5  # fp32, other orders of summation through three layers, of the largest entry
BF16_TOLERANCE = 0.05  # of a tensor's norm: Triton also rounds absorbed queries, probabilities and latents, 2^-9 each
# An indexer's gradient is a difference of two distributions, here of an untrained one, so most of it cancels
BF16_INDEXER_TOLERANCE = 0.4


@pytest.mark.parametrize("mode", MODES)
def test_triton_equals_torch(mode):
    pytest.importorskip("triton", reason="the kernels need triton")
    config = dataclasses.replace(CONFIG, num_hidden_layers=2)
    results = {}
    for backend in ("torch", "triton"):
        net = tiny_net(config)
        net.use(OpSettings(backend, workspace=1 << 16, deterministic=True))
        if mode == "warmup":
            for name, parameter in net.named_parameters():
                parameter.requires_grad_(".indexer." in name)
        out = net(**batch([11, 1, 9], padding=2), **MODES[mode])
        total_loss(out).backward()
        found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        for field in ("indexer_kl", "token_logprobs", "mtp_logprobs"):
            if getattr(out, field) is not None:
                found[field] = getattr(out, field).detach()
        results[backend] = found
    assert results["torch"].keys() == results["triton"].keys() and len(results["torch"]) > 5
    for name, expected in results["torch"].items():
        error = (results["triton"][name] - expected).abs().max()
        assert error <= TOLERANCE * max(1e-2, expected.abs().max().item()), f"{name}: {error:.2e}"


@pytest.mark.parametrize("mode", MODES)
def test_triton_under_autocast(mode):
    """As a run with precision=bf16 has it: some of what meets in an op is bf16 and some, behind a norm, fp32."""
    pytest.importorskip("triton", reason="the kernels need triton")
    import tests.model.ops.interpreter  # noqa: F401  (repairs bf16 in the interpreter)

    config = dataclasses.replace(CONFIG, num_hidden_layers=2)
    results = {}
    for backend in ("torch", "triton"):
        net = tiny_net(config)
        net.use(OpSettings(backend, workspace=1 << 16, deterministic=True))
        options = dict(MODES[mode])
        if mode == "warmup":  # the stage's own: a frozen trunk whose dense attention the loss's pass makes
            options |= {"lm_loss": False, "trunk_grad": False}
            for name, parameter in net.named_parameters():
                parameter.requires_grad_(".indexer." in name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(**batch([11, 1, 9], padding=2), **options)
        total_loss(out).backward()
        results[backend] = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        if out.indexer_kl is not None:
            results[backend]["indexer_kl"] = out.indexer_kl.detach()
    assert results["torch"].keys() == results["triton"].keys() and len(results["torch"]) > 5
    for name, expected in results["torch"].items():
        error = (results["triton"][name] - expected).norm() / expected.norm().clamp(min=1e-2)
        limit = BF16_INDEXER_TOLERANCE if ".indexer." in name else BF16_TOLERANCE
        assert error <= limit, f"{name}: {error:.2e}"
