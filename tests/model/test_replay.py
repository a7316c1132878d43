"""Repeating a sampler's choices: only the choice is repeated, gradients reach the router, disagreement is counted."""

from __future__ import annotations

import pytest
import torch

import model.mla
from model.replay import Replay, routes_agree, selection_overlap
from tests.model.tiny import CONFIG, batch, tiny_net

LENGTHS = [20, 9]
MOE_LAYERS = CONFIG.num_hidden_layers - CONFIG.first_k_dense_replace


def rows() -> dict[str, torch.Tensor]:
    return batch(LENGTHS)


def forced(seed: int = 0) -> torch.Tensor:
    """Experts [M, R, K] at random, each row's different from one another."""
    draw = torch.Generator().manual_seed(seed)
    shape = (MOE_LAYERS, len(rows()["input_ids"]), CONFIG.n_routed_experts)
    return torch.rand(shape, generator=draw).argsort(-1)[..., : CONFIG.num_experts_per_tok]


def chosen(net, **kwargs) -> list[torch.Tensor]:
    """The experts that each MoE layer of the trunk went by."""
    found: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, inputs, routing: found.append(routing.experts))
        for layer in net.layers[CONFIG.first_k_dense_replace :]
    ]
    net(**rows(), mtp=False, **kwargs)
    for hook in hooks:
        hook.remove()
    return found


def test_recorded_experts_are_taken_and_missing_rows_are_the_routers() -> None:
    net, experts = tiny_net(), forced()
    experts[:, 3] = -1
    live, repeated = chosen(net), chosen(net, replay=Replay(experts))
    for layer in range(MOE_LAYERS):
        known = torch.arange(len(experts[layer])) != 3
        assert torch.equal(repeated[layer][known], experts[layer][known])
        assert not torch.equal(live[layer][known], experts[layer][known])
    assert torch.equal(repeated[0][3], live[0][3])
    ignored = chosen(net, replay=Replay(experts, keep_routing=False))
    assert all(torch.equal(a, b) for a, b in zip(ignored, live, strict=True))


def test_gates_come_from_live_scores_and_the_gradient_reaches_the_router() -> None:
    net, experts = tiny_net(), forced(1)
    out = net(**rows(), mtp=False, replay=Replay(experts))
    out.token_logprobs.sum().backward()
    gate = net.layers[CONFIG.first_k_dense_replace].mlp.gate
    assert gate.weight.grad is not None and gate.weight.grad.abs().sum() > 0
    x = torch.randn(5, CONFIG.hidden_size, generator=torch.Generator().manual_seed(2))
    part = Replay(experts[:, :5]).layer(CONFIG.first_k_dense_replace, 0)
    routing = gate(x, part)
    scores = torch.sigmoid(x @ gate.weight.T).gather(1, experts[0, :5])
    wanted = scores / scores.sum(1, keepdim=True) * CONFIG.routed_scaling_factor
    torch.testing.assert_close(routing.gates, wanted)


def selections(net, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """What every layer of the trunk selects, [L, R, k]."""
    found: list[torch.Tensor] = []
    with monkeypatch.context() as patch:
        real = model.mla.index_topk
        patch.setattr(model.mla, "index_topk", lambda *a, **k: found.append(real(*a, **k)) or found[-1])
        net(**rows(), mtp=False)
    return torch.stack(found)


@pytest.mark.parametrize("keep", [True, False])
def test_recorded_positions_are_attended_to(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The selection of a model with another indexer, repeated, gives what that model attends to."""
    net, other = tiny_net(), tiny_net()
    other.init_indexer(seed=5)
    theirs = selections(other, monkeypatch)
    wanted = other(**rows(), mtp=False).token_logprobs
    out = net(**rows(), mtp=False, replay=Replay(selected=theirs, keep_selection=keep))
    live = net(**rows(), mtp=False).token_logprobs
    assert not torch.allclose(live, wanted, atol=1e-4)
    torch.testing.assert_close(out.token_logprobs, wanted if keep else live, rtol=0, atol=1e-5)
    shared, counted = out.replay["selection"].unbind(1)
    assert (counted == sum(max(0, n - CONFIG.index_topk) for n in LENGTHS)).all()
    assert (shared < counted).all() and (shared > 0.1 * counted).all()


def test_routes_agree_as_sets_and_unrecorded_rows_do_not_count() -> None:
    live = torch.tensor([[1, 2], [3, 0], [1, 0], [2, 3]])
    recorded = torch.tensor([[2, 1], [3, 1], [-1, -1], [2, 3]], dtype=torch.int16)
    assert routes_agree(live, recorded).tolist() == [2, 3]


def test_selection_overlap_counts_rows_that_had_a_choice() -> None:
    live = torch.tensor([[0, 1, -1], [0, 1, 2], [1, 2, 4], [0, 3, 5]], dtype=torch.int32)
    recorded = torch.tensor([[0, 1, -1], [0, 1, 2], [0, 2, 4], [-1, -1, -1]], dtype=torch.int32)
    visible = torch.tensor([2, 3, 5, 6])
    assert selection_overlap(live, recorded, visible).tolist() == [pytest.approx(2 / 3), 1.0]
