"""The planner's time, search and budgets: what adds up, what must not be varied, what is known from the reports."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from conf.hardware import Cluster, load_cluster
from conf.load import load
from conf.schema import ModelConfig, ParallelConfig
from conf.validate import offload as offload_rule
from conf.validate import sequence_fits, stage_layout, world_divides
from conf.validate_pipeline import PIPELINE_RULES
from tests.train import tiny
from train.budgets import PAPER_TOKENS, PRETRAIN_LENGTH, PRETRAIN_TOKENS, RL_SHARE, budgets, rl_tokens
from train.communication import Flow, flows
from train.flops import flops_per_token
from train.job import Job
from train.layouts import Found, candidates, leanest, search
from train.memory_model import predict
from train.stages import STAGES
from train.step_time import floor_flops, predict_step, step_flops


@pytest.fixture(scope="module")
def v3_2() -> ModelConfig:
    return load(["+stage=pretrain", "model=deepseek_v3_2"]).config.model


@pytest.fixture(scope="module")
def h800() -> Cluster:
    return load_cluster("h800_2048")


def adapt(model: ModelConfig, world: int = 2048, **parallel: int | str) -> Job:
    given = ParallelConfig(**{"zero": 3, "ep": 64, "cp": 32} | parallel)  # type: ignore[arg-type]
    return Job(model, STAGES["sparse_adapt"], given, world, 131072, "bf16", 8, True, True)


@pytest.mark.parametrize("stage", ["pretrain", "dense_warmup", "sparse_adapt", "sft", "grpo"])
@pytest.mark.parametrize("mtp", ["keep", "drop"])
def test_parts_of_a_step_are_all_its_flops(stage: str, mtp: str) -> None:
    model = replace(tiny.MODEL, mtp=mtp)
    parts = step_flops(model, STAGES[stage], 48, checkpointing=False)
    whole = flops_per_token(model, STAGES[stage], 48) * 48
    if stage == "grpo" and mtp == "keep":  # RL leaves MTP out
        whole = flops_per_token(replace(model, mtp="drop"), STAGES[stage], 48) * 48
    assert sum(parts.values()) == pytest.approx(whole) and min(parts.values()) >= 0


def test_checkpointed_layers_run_forward_twice() -> None:
    once, twice = (step_flops(tiny.MODEL, STAGES["sparse_adapt"], 48, again) for again in (False, True))
    assert twice["attention_forward"] == 2 * once["attention_forward"] and twice["head"] == once["head"]
    assert twice["experts"] == pytest.approx(once["experts"] * 4 / 3)
    frozen = STAGES["dense_warmup"]
    assert step_flops(tiny.MODEL, frozen, 48, True) == step_flops(tiny.MODEL, frozen, 48, False)


def test_what_leaves_a_node() -> None:
    """Nodes of 8."""
    ring = Flow("weights", "all-gather", 1600, 16, 1, "forward")
    assert ring.sent(8) == (1500.0, 1500.0 / 8)
    assert replace(ring, collective="all-reduce").sent(8) == (3000.0, 3000.0 / 8)
    assert replace(ring, ranks=8).sent(8) == (1400.0, 0.0)
    assert replace(ring, stride=8).sent(8) == (0.0, 1500.0)  # one rank of it in each node
    assert replace(ring, collective="all-to-all").sent(8) == (700.0, 800.0)
    assert Flow("hidden states", "send", 10, 2, 4, "forward").sent(8) == (10.0, 0.0)
    assert Flow("hidden states", "send", 10, 2, 8, "forward").sent(8) == (0.0, 10.0)


def test_waiting_is_what_is_not_hidden(v3_2: ModelConfig, h800: Cluster) -> None:
    job = adapt(v3_2)
    found = predict_step(job, h800)
    rest = sum(found.network.values()) - found.network["weights, forward"]
    assert found.network["weights, forward"] < sum(found.compute.values())  # gathered ahead
    assert found.waiting == pytest.approx(rest)
    assert predict_step(job, h800, hidden=0.5).waiting == pytest.approx(rest / 2)
    best = predict_step(job, h800, hidden=1.0).waiting  # no more can hide than computing lasts
    assert best == pytest.approx(max(0.0, rest - sum(found.compute.values())))
    assert found.tokens == 64 * 8 * 131072 and found.bubble == 0


def test_floors_share_the_work_out() -> None:
    model = replace(tiny.MODEL, num_hidden_layers=6)
    for stage in ("pretrain", "dense_warmup", "sparse_adapt"):
        whole = step_flops(model, STAGES[stage], 48, True)
        floors = [floor_flops(model, STAGES[stage], 48, True, 4, floor) for floor in range(4)]
        for name, count in whole.items():
            assert sum(floor[name] for floor in floors) == pytest.approx(count), (stage, name)


def test_the_bubble_of_1f1b(h800: Cluster) -> None:
    """Where floors are alike it is (pp - 1) / micro-batches of the work; else the slowest sets the pace."""
    model = replace(tiny.MODEL, num_hidden_layers=8, first_k_dense_replace=0, vocab_size=1, mtp="drop")
    job = Job(model, STAGES["dense_warmup"], ParallelConfig(pp=4), 4, 64, sequences=6)
    quick = replace(h800, network=replace(h800.network, intra_gb_per_s=1e9))
    found = predict_step(job, quick)
    assert found.bubble == pytest.approx(3 / 6 * sum(found.compute.values()), rel=1e-3)
    uneven = predict_step(replace(job, model=replace(model, num_hidden_layers=5)), quick)  # 2, 1, 1, 1 layers
    assert uneven.floor == 0 and uneven.bubble == pytest.approx(3 / 6 * sum(uneven.compute.values()) / 2, rel=1e-3)
    assert any(flow.what == "hidden states" for flow in flows(job))


def test_a_search_goes_into_depth(v3_2: ModelConfig, h800: Cluster) -> None:
    found = search(adapt(v3_2), h800, 480, {"zero": 1, "checkpointing": True, "ep": 32})
    assert {one.job.pp for one in found} >= {8, 16}
    assert all(one.job.pp <= one.job.sequences and f"parallel.pp={one.job.pp}" in one.settings for one in found)
    assert {one.job.pp for one in search(adapt(v3_2), h800, 480, {"pp": 1, "cp": 32})} == {1}


def test_a_search_finds_what_fits_the_quickest_first(v3_2: ModelConfig, h800: Cluster) -> None:
    job = adapt(v3_2)
    found = search(job, h800, 480, {"zero": 3, "checkpointing": True})
    assert len(found) > 5
    assert all(one.memory.total <= 80e9 and one.job.parallel.zero == 3 and one.job.checkpointing for one in found)
    assert all(one.job.parallel.offload == "none" for one in found)
    speeds = [one.time.tokens_per_s for one in found]
    assert speeds == sorted(speeds, reverse=True)
    assert all(480 <= one.job.replicas * one.job.sequences <= 600 for one in found)
    assert found[0].memory == predict(found[0].job) and found[0].time == predict_step(found[0].job, h800)


def test_offload_where_nothing_fits_without(v3_2: ModelConfig, h800: Cluster) -> None:
    tight = replace(h800, gpu=replace(h800.gpu, memory_gb=26.0))
    held = {"zero": 3, "checkpointing": True, "cp": 128}
    assert search(adapt(v3_2), replace(h800, gpu=replace(h800.gpu, memory_gb=20.0)), 480, held) == []
    found = search(adapt(v3_2), tight, 480, held)
    assert found and all(one.job.parallel.offload == "cpu" for one in found)
    lean, memory = leanest(adapt(v3_2), 480, held) or pytest.fail("there are layouts")
    assert lean.parallel.offload == "cpu" and memory.total > 20e9


def test_layouts_are_those_that_the_stage_takes(v3_2: ModelConfig) -> None:
    tried = list(candidates(adapt(v3_2), 480, {}))
    assert len(tried) > 200
    for job in tried:
        parallel = job.parallel
        assert job.world % parallel.ep == 0 == job.world % parallel.cp and 131072 % (2 * parallel.cp) == 0
        assert not (parallel.zero == 0 and parallel.ep > 1)
        assert parallel.pp == 1 or (parallel.zero, parallel.offload) == (1, "none") and job.sequences >= parallel.pp
    cpu = adapt(v3_2, offload="cpu", offload_parameters=True)
    assert {one.parallel.zero for one in candidates(cpu, 480, {"offload": "cpu"})} == {3}
    assert leanest(replace(tried[0], seq_len=1000), 16, {}) is None, "2,048 processes cannot share so short rows"
    assert {job.checkpointing for job in candidates(replace(tried[0], stage=STAGES["dense_warmup"]), 16, {})} == {False}


@pytest.mark.parametrize("stage", ["sparse_adapt", "grpo"])
def test_what_is_tried_is_what_a_run_accepts(stage: str) -> None:
    """All of the small layouts, against the rules of launch/stage.py for layouts (all of them take 0.2 s a layout)."""
    rules = (sequence_fits, world_divides, stage_layout, offload_rule, *PIPELINE_RULES)
    config = load([f"+stage={stage}", "data.seq_len=48", "rl.prompts_per_step=8"]).config
    world, micro_batches = 8, 2
    base = Job(config.model, STAGES[stage], config.parallel, world, 48, sequences=micro_batches)
    tried = {one.parallel for one in candidates(base, 16, {"sequences": micro_batches, "checkpointing": False})}
    degrees = (1, 2, 4, 8)
    ways = product((0, 1, 2, 3), degrees, degrees, degrees, ("none", "cpu"))
    for zero, ep, cp, pp, offload in ways:
        parallel = replace(config.parallel, zero=zero, ep=ep, cp=cp, pp=pp, offload=offload)
        train = replace(config.train, micro_batches=micro_batches)
        given = replace(config, parallel=parallel, train=train)
        refused = [message for rule in rules for message in rule(given, world)]
        assert (parallel in tried) == (refused == []), (parallel, refused)
    assert len(tried) > 30


def test_budgets_of_the_paper(v3_2: ModelConfig, h800: Cluster) -> None:
    job = adapt(v3_2)
    found = Found(job, predict(job), predict_step(job, h800))
    (warm, none), (sparse, dense), (rl, rl_dense) = budgets(found, h800)
    assert none is None and dense is not None and rl_dense is not None
    assert (warm.tokens, sparse.tokens) == (2.1e9, 943.7e9) == tuple(PAPER_TOKENS.values())
    assert sparse.hours == pytest.approx(943.7e9 / found.time.tokens_per_s * 2048 / 3600)
    assert dense.hours > 1.2 * sparse.hours > 100 * warm.hours
    pretraining = PRETRAIN_TOKENS * flops_per_token(v3_2, STAGES["pretrain"], PRETRAIN_LENGTH)
    assert rl_tokens(found) * rl.flops == pytest.approx(RL_SHARE * pretraining)
    assert rl.tokens == rl_dense.tokens and rl.hours > 0 < rl_dense.hours
    deep = Found(replace(job, parallel=ParallelConfig(ep=32, cp=64, pp=16), sequences=240), found.memory, found.time)
    assert len(budgets(deep, h800)) == 2, "RL is refused in depth"
