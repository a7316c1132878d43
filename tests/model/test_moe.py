"""Routing, dispatch, balancing against loops over tokens written from DeepSeek-V3's equations."""

from __future__ import annotations

import torch

from model.context import Context
from model.moe import MoE, balance_loss
from tests.model.tiny import CONFIG, tiny_net


def moe() -> MoE:
    layer = tiny_net().layers[1].mlp
    assert isinstance(layer, MoE)
    return layer


def route_token(layer: MoE, x: torch.Tensor) -> dict[int, float]:
    """Expert -> gate of one token, eq. 12-16 with the group limit: the best group by its two largest biased scores."""
    scores = [float(torch.sigmoid(x @ w)) for w in layer.gate.weight.detach()]
    biased = [s + float(b) for s, b in zip(scores, layer.gate.e_score_correction_bias, strict=True)]
    size = len(scores) // CONFIG.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(CONFIG.n_group)]
    best = sorted(groups, key=lambda g: -sum(sorted((biased[e] for e in g), reverse=True)[:2]))[: CONFIG.topk_group]
    chosen = sorted((e for g in best for e in g), key=lambda e: -biased[e])[: CONFIG.num_experts_per_tok]
    whole = sum(scores[e] for e in chosen)
    return {e: scores[e] / whole * CONFIG.routed_scaling_factor for e in chosen}


def test_output_is_the_gated_sum_of_the_chosen_experts_and_the_shared_one() -> None:
    layer, x = moe(), torch.randn(17, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
    out, counts, *_ = layer(x, Context.whole(torch.zeros(17, dtype=torch.int64)))
    e, loads = layer.experts, [0] * CONFIG.n_routed_experts
    for t in range(17):
        expected = layer.shared_experts(x[t])
        for i, gate in route_token(layer, x[t]).items():
            loads[i] += 1
            expected = expected + gate * (e.w2[i] @ (torch.nn.functional.silu(e.w1[i] @ x[t]) * (e.w3[i] @ x[t])))
        torch.testing.assert_close(out[t], expected, rtol=1e-5, atol=1e-5)
    assert counts.tolist() == loads


def test_bias_steers_the_choice_and_never_the_gate() -> None:
    layer, x = moe(), torch.randn(9, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    layer.gate.e_score_correction_bias.copy_(torch.tensor([5.0, 5.0, 0.0, 0.0]))
    routing = layer.gate(x)
    assert set(routing.experts.flatten().tolist()) == {0, 1}
    scores = torch.sigmoid(x @ layer.gate.weight.T).gather(1, routing.experts)
    torch.testing.assert_close(routing.gates, scores / scores.sum(1, keepdim=True))


def test_bias_update_moves_towards_balance_by_the_speed() -> None:
    net = tiny_net()
    for router in net.routers():
        router.e_score_correction_bias.zero_()
    counts = torch.tensor([[10, 0, 5, 5], [0, 8, 8, 4], [5, 5, 5, 5]])
    net.update_router_bias(counts, 0.25)
    assert [r.e_score_correction_bias.tolist() for r in net.routers()] == [
        [-0.25, 0.25, 0.0, 0.0],
        [0.25, -0.25, -0.25, 0.25],
        [0.0, 0.0, 0.0, 0.0],
    ]


def test_balance_loss_is_the_token_weighted_mean_of_each_documents_sum_f_p() -> None:
    layer, lengths = moe(), [11, 1, 6]
    x = torch.randn(20, CONFIG.hidden_size, generator=torch.Generator().manual_seed(2))
    doc_start = torch.tensor([0] * 11 + [11] + [12] * 6 + [20] * 2)
    routing = layer.gate(x)
    expected, start = 0.0, 0
    for n in lengths:
        f, p = [0.0] * 4, [0.0] * 4
        for t in range(start, start + n):
            for e in routing.experts[t].tolist():
                f[e] += 4 / (CONFIG.num_experts_per_tok * n)
            for e in range(4):
                p[e] += float((routing.scores[t, e] / routing.scores[t].sum()).detach()) / n
        expected += n * sum(a * b for a, b in zip(f, p, strict=True))
        start += n
    torch.testing.assert_close(
        float(balance_loss(routing, Context.whole(doc_start)).detach()), expected / sum(lengths), rtol=1e-6, atol=0
    )


def test_empty_experts_and_gradients_of_the_rest() -> None:
    layer, x = moe(), torch.randn(3, CONFIG.hidden_size)
    layer.gate.e_score_correction_bias.copy_(torch.tensor([5.0, 5.0, 0.0, 0.0]))
    out, counts, *_ = layer(x, Context.whole(torch.zeros(3, dtype=torch.int64)))
    out.sum().backward()
    assert counts.tolist() == [3, 3, 0, 0]
    assert not layer.experts.w1.grad[2:].any() and bool(layer.experts.w1.grad[:2].any())
    assert bool(layer.gate.weight.grad[:2].any())
