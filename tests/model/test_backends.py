"""The whole model on the Triton kernels (in the interpreter, without a GPU) against plain torch: every output and every
gradient of the four ways a step may run, packed and past index_topk. What torch's conformance tests show, this carries
over to Triton.
"""

from __future__ import annotations

import dataclasses

import pytest

from model.ops.settings import OpSettings
from tests.model.test_transformer import MODES, total_loss
from tests.model.tiny import CONFIG, batch, tiny_net

TOLERANCE = 2e-5  # fp32, other orders of summation through three layers, of the largest entry


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
