"""The indexer's two losses as a layer computes them: value against the fp64 reference layer, reach of the gradients."""

import pytest
import torch
from torch import Tensor

from model.context import Context
from model.mla import MLA
from tests.model.ops.cases import make_doc_start
from tests.model.reference_layer import attention_layer, mla_heads, mla_scale
from tests.model.test_attention_conformance import LENGTHS, PADDING, make_config, make_inputs, make_layer

STAGES = [("dense", "dense"), ("sparse", "selected")]


def run(layer: MLA, x: Tensor, cos: Tensor, sin: Tensor, attention: str, loss: str | None, stats: bool = False):
    return layer(x, cos, sin, Context.whole(make_doc_start(LENGTHS, PADDING)), attention, loss, stats)[:2]


def expected_sums(layer: MLA, x: Tensor, sparse: bool) -> dict[str, float]:
    """Sums over rows, from the reference layer's scores, sets and heads; the target over S_t where `sparse`."""
    config, doc_start = make_config(), make_doc_start(LENGTHS, PADDING)
    found = attention_layer(layer.state_dict(), config, x, doc_start)
    weights = {name: tensor.double() for name, tensor in layer.state_dict().items()}
    positions = (torch.arange(len(doc_start)) - doc_start).clamp(min=0)
    q, k, _ = mla_heads(weights, config, x.double(), found.q_latent, positions)
    sums = dict.fromkeys(("kl", "kl_uniform", "mass", "oracle_mass", "rows"), 0.0)
    for t, start in enumerate(doc_start.tolist()):
        over = found.chosen[t] if sparse else list(range(start, t + 1))
        if not over:
            continue
        target = (torch.einsum("hd,shd->hs", q[t], k[over]) * mla_scale(config)).softmax(dim=-1).mean(dim=0)
        student = found.scores[t, over].softmax(dim=-1)
        sums["kl"] += (target * (target / student).log()).sum().item()
        sums["kl_uniform"] += (target * (target * len(over)).log()).sum().item()
        sums["mass"] += sum(p for s, p in zip(over, target.tolist(), strict=True) if s in found.chosen[t])
        sums["oracle_mass"] += sum(sorted(target.tolist(), reverse=True)[: config.index_topk])
        sums["rows"] += 1
    return sums


@pytest.mark.parametrize(("attention", "loss"), STAGES)
def test_value_equals_the_reference(attention, loss):
    layer = make_layer(make_config())
    x, cos, sin = make_inputs(make_config(), make_doc_start(LENGTHS, PADDING))
    _, found = run(layer, x, cos, sin, attention, loss, stats=True)
    expected = expected_sums(layer, x, sparse=attention == "sparse")
    assert found is not None
    assert found.kl_sum.item() == pytest.approx(expected.pop("kl"), rel=2e-5)
    assert {"kl_uniform", "rows"} <= found.stats.keys()
    for name, value in found.stats.items():
        assert value.item() == pytest.approx(expected[name], rel=2e-5), name


@pytest.mark.parametrize(("attention", "loss"), STAGES)
def test_its_gradient_stays_in_the_indexer(attention, loss):
    layer = make_layer(make_config())
    x, cos, sin = make_inputs(make_config(), make_doc_start(LENGTHS, PADDING))
    x.requires_grad_()
    _, found = run(layer, x, cos, sin, attention, loss)
    assert found is not None
    found.kl_sum.backward()
    assert x.grad is None
    for name, parameter in layer.named_parameters():
        if name.startswith("indexer."):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize(("attention", "loss"), STAGES)
def test_the_output_sends_no_gradient_into_the_indexer(attention, loss):
    layer = make_layer(make_config())
    x, cos, sin = make_inputs(make_config(), make_doc_start(LENGTHS, PADDING))
    x.requires_grad_()
    out, _ = run(layer, x, cos, sin, attention, loss)
    out.square().sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    assert all(p.grad is None for p in layer.indexer.parameters())
    assert all(p.grad is not None for name, p in layer.named_parameters() if not name.startswith("indexer."))


@pytest.mark.parametrize(("attention", "loss"), STAGES)
def test_gradients_of_the_parameters_by_finite_differences(attention, loss):
    """Along a random direction uphill; the selection is piecewise constant, so the step is small."""
    layer = make_layer(make_config())
    x, cos, sin = make_inputs(make_config(), make_doc_start(LENGTHS, PADDING))
    _, found = run(layer, x, cos, sin, attention, loss)
    assert found is not None
    found.kl_sum.backward()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in layer.indexer.named_parameters():
        assert parameter.grad is not None
        size = torch.rand(parameter.shape, generator=generator) * parameter.detach().abs().mean()
        direction = size * parameter.grad.sign()
        sums, original, step = [], parameter.detach().clone(), 1e-4
        for sign in (1, -1):
            parameter.data.copy_(original + sign * step * direction)
            sums.append(expected_sums(layer, x, sparse=attention == "sparse")["kl"])
        parameter.data.copy_(original)
        slope = (sums[0] - sums[1]) / (2 * step)
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=5e-3), name


def test_the_trunk_may_run_without_gradients():
    """Warm-up: no graph of the trunk, the same gradients in the indexer."""
    x, cos, sin = make_inputs(make_config(), make_doc_start(LENGTHS, PADDING))
    grads = []
    for trunk_grad in (True, False):
        layer = make_layer(make_config())
        with torch.set_grad_enabled(trunk_grad):
            out, found = run(layer, x, cos, sin, "dense", "dense")
        assert found is not None and out.requires_grad == trunk_grad
        found.kl_sum.backward()
        grads.append([p.grad for p in layer.indexer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
