"""The formulas of train/flops.py against torch's FlopCounterMode: equal to the last FLOP once what runs beyond them is
named.

The counter sees matrix products alone: no elementwise work, softmax, norm, gather, scatter or top-k, and of torch's
products neither `aten._grouped_mm` (it has no formula: `GROUPED` is ours) nor the CPU's fused SDPA (so dense attention
runs through torch's math backend here). With a workspace of one byte the streaming ops take one query row at a time and
compute exactly the visible keys; larger blocks compute masked entries as well, which
`test_larger_blocks_only_add_masked_entries` shows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.plan_flops import EXACT, beyond, count
from conf.schema import ModelConfig
from model import Transformer
from model.generate import Ask, Decoder, Sampling, generate
from tests.model import tiny
from tests.train.counted import MODEL
from train.flops import (
    Row,
    attention_weights,
    flops_per_token,
    indexer_weights,
    pair_flops,
    row_flops,
    sampler_flops,
    score_flops,
    score_gradient_flops,
    selected_pairs,
    trunk_weights,
    visible_pairs,
)
from train.stages import STAGES

RL = {"mtp": False}


def row_of(lengths: list[int], batch: dict[str, torch.Tensor]) -> Row:
    return Row(tuple(lengths), *(int((batch[name] >= 0).sum()) for name in ("labels", "mtp_labels")))


FORMS = [
    ("pretrain", {}),  # dense
    ("dense_warmup", {}),  # dense, indexer over all visible keys
    ("sparse_adapt", {}),  # top-k, indexer over the selection
    ("sft", {}),
    ("grpo", RL),  # top-k, indexer frozen
]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("lengths", "padding"), [([11, 8], 0), ([4, 3], 0), ([12], 4)])
@pytest.mark.parametrize(("stage", "forward"), FORMS)
def test_every_stage_to_the_last_flop(
    stage: str, forward: dict[str, Any], lengths: list[int], padding: int, backward: bool
) -> None:
    net = tiny.tiny_net(MODEL)
    net.use(EXACT)
    batch = tiny.batch(lengths, padding)
    mtp = forward.get("mtp", True)
    row = row_of(lengths, batch)
    needed = row_flops(MODEL, STAGES[stage], row, mtp=mtp, backward=backward)
    extra = beyond(MODEL, stage, row, sum(lengths) + padding, backward, mtp)
    assert count(net, stage, batch, backward, **forward) == sum(needed.values()) + sum(extra.values()), extra
    assert all(value >= 0 for value in (*needed.values(), *extra.values()))


def test_an_evaluation_is_a_sparse_forward() -> None:
    net = tiny.tiny_net(MODEL)
    net.use(EXACT)
    batch = tiny.batch([11, 8])
    row = row_of([11, 8], batch)
    extra = beyond(MODEL, "evaluate", row, 19, False, False)
    needed = row_flops(MODEL, STAGES["evaluate"], row, backward=False)
    assert needed["head"] == 0  # rows are drawn from, or scored, by their caller
    assert count(net, "evaluate", batch, False) == sum(needed.values()) + sum(extra.values())


@pytest.mark.parametrize("stage", ["dense_warmup", "grpo"])
def test_without_mtp_layers(stage: str) -> None:
    model = replace(MODEL, num_nextn_predict_layers=0)
    net = tiny.tiny_net(model)
    net.use(EXACT)
    batch = tiny.batch([14])
    row = row_of([14], batch)
    extra = sum(beyond(model, stage, row, 14, True, False).values())
    assert count(net, stage, batch, True) == sum(row_flops(model, STAGES[stage], row).values()) + extra


def test_grouped_products_are_the_same_flops() -> None:
    """Widths that the grouped product takes; the counter sees it by a formula of this file."""
    net = tiny.tiny_net()
    net.use(EXACT)
    batch = tiny.batch([20, 9])
    row = row_of([20, 9], batch)
    extra = sum(beyond(tiny.CONFIG, "grpo", row, 29, True, False).values())
    needed = sum(row_flops(tiny.CONFIG, STAGES["grpo"], row, mtp=False).values())
    assert count(net, "grpo", batch, True, mtp=False) == needed + extra


def test_larger_blocks_only_add_masked_entries() -> None:
    """The default workspace takes 64 query rows at once: 29 rows x 29 keys, where 255 of the pairs are visible."""
    net = tiny.tiny_net(MODEL)
    batch = tiny.batch([20, 9])
    row = row_of([20, 9], batch)
    needed = sum(row_flops(MODEL, STAGES["dense_warmup"], row).values())
    a_pair = pair_flops(MODEL, "dense") + score_flops(MODEL) + score_gradient_flops(MODEL)
    masked = 29 * 29 - visible_pairs(row.lengths)
    assert visible_pairs(row.lengths) == 255
    assert count(net, "dense_warmup", batch, True) == needed + 4 * a_pair * masked


@pytest.mark.parametrize("attention", ["sparse", "dense"])
@pytest.mark.parametrize("cached", [1, 5, 6, 7, 40])  # around index_topk = 6
def test_a_decode_step_to_the_last_flop(attention: str, cached: int) -> None:
    """With the draw's head; past index_topk it scores `cached` + 1 rows and reads 6."""
    net = tiny.tiny_net(MODEL).requires_grad_(False)
    decoder = Decoder(net, 1, 64, attention)
    decoder.prefill([list(range(1, cached + 1))])
    with FlopCounterMode(display=False) as counter:
        hidden = decoder.hidden(torch.tensor([[3]]), torch.tensor([[cached]])).squeeze(1)
        net.lm_head(hidden)
    needed = sampler_flops(MODEL, attention, cached, cached + 1, 1)
    assert counter.get_total_flops() == sum(needed.values())
    scored = 3 * score_flops(MODEL) * (cached + 1)
    assert needed["index_scores"] == (scored if attention == "sparse" and cached >= 6 else 0)


@pytest.mark.parametrize(("attention", "length"), [("sparse", 5), ("sparse", 6), ("sparse", 30), ("dense", 30)])
def test_a_prompt_costs_its_rows_and_the_masked_half_beside(attention: str, length: int) -> None:
    """A prompt is read in one chunk here: all its rows against all its keys, scored only past index_topk."""
    net = tiny.tiny_net(MODEL).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        Decoder(net, 1, 64, attention).prefill([list(range(1, length + 1))])
    needed = sampler_flops(MODEL, attention, 0, length, 0)
    square, layers = length**2, MODEL.num_hidden_layers
    extra = layers * pair_flops(MODEL, "sparse") * square - needed["attention"]
    if attention == "sparse" and length > MODEL.index_topk:
        extra += layers * score_flops(MODEL) * square - needed["index_scores"]
    assert counter.get_total_flops() == sum(needed.values()) + extra


def test_a_whole_rollout_is_its_prompt_and_its_steps() -> None:
    """Four samples of one prompt: read once; each draws 12 tokens and runs all but the last."""
    net = tiny.tiny_net(MODEL).requires_grad_(False)
    asks = [Ask((5, 6, 7, 8), seed, 12) for seed in range(4)]
    with FlopCounterMode(display=False) as counter:
        drawn = generate(net, asks, Sampling(), eos_id=MODEL.vocab_size + 1)
    assert [len(sample.ids) for sample in drawn] == [12] * 4
    needed = sum(sampler_flops(MODEL, "sparse", 0, 4, 0).values())
    needed += 4 * sum(sampler_flops(MODEL, "sparse", 4, 4 + 11, 12).values())
    masked = MODEL.num_hidden_layers * pair_flops(MODEL, "sparse") * (4 * 4 - visible_pairs([4]))
    assert counter.get_total_flops() == needed + masked


def test_the_sampler_adds_up_over_steps() -> None:
    for attention in ("sparse", "dense"):
        whole = sampler_flops(MODEL, attention, 3, 40, 37)
        steps = [sampler_flops(MODEL, attention, position, position + 1, 1) for position in range(3, 40)]
        assert whole == {part: sum(step[part] for step in steps) for part in whole}


@pytest.mark.parametrize("lengths", [[1], [6], [7], [3, 50, 6, 1]])
def test_pairs_by_brute_force(lengths: list[int]) -> None:
    rows = [seen for length in lengths for seen in range(1, length + 1)]
    assert visible_pairs(lengths) == sum(rows)
    assert selected_pairs(lengths, 6) == sum(min(6, seen) for seen in rows)


def test_flops_count_the_weights_that_a_token_meets() -> None:
    dense = ModelConfig(first_k_dense_replace=4, num_nextn_predict_layers=0)
    net = Transformer(dense)
    matrices = {n: p for n, p in net.named_parameters() if p.dim() == 2 and not n.startswith("embed")}
    assert trunk_weights(dense) == sum(p.numel() for n, p in matrices.items() if ".indexer." not in n)
    assert 4 * indexer_weights(dense) == sum(p.numel() for n, p in matrices.items() if ".indexer." in n)
    one = net.layers[0].self_attn
    assert attention_weights(dense) == sum(
        p.numel() for n, p in one.named_parameters() if p.dim() == 2 and "indexer" not in n
    )


def test_flops_of_a_token_by_stage_and_length() -> None:
    dense = ModelConfig(first_k_dense_replace=4, num_nextn_predict_layers=0)
    pretrain, warmup, adapt = (STAGES[name] for name in ("pretrain", "dense_warmup", "sparse_adapt"))
    attention = 4 * 2 * 4 * (48 + 32) * 513 / 2  # layers, 2 FLOPs, heads, widths, keys seen of 512
    assert flops_per_token(dense, pretrain, 512) == 3 * (2 * trunk_weights(dense) + attention)
    assert flops_per_token(dense, warmup, 512) < flops_per_token(dense, pretrain, 512)
    # twice the context: the indexer scores twice the keys, once; attention and the loss read k of them as before, and
    # the rows at the start that see fewer weigh half as much
    grown = flops_per_token(dense, adapt, 2048) - flops_per_token(dense, adapt, 1024)
    scored = 4 * 2 * 16 * 33 * 512
    a_pair = 4 * (3 * 2 * 4 * (2 * 64 + 16) + 2 * 16 * 65)
    fewer = 64 * 63 / 2 * (1 / 1024 - 1 / 2048)
    assert grown == pytest.approx(scored + a_pair * fewer, rel=1e-12)
