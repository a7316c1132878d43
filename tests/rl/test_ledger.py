"""The compute ledger: an iteration against torch's counter, the share of pre-training, and what is not known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from bench.plan_flops import beyond
from conf.convert import save_yaml
from conf.schema import RLConfig, RunConfig
from model.generate import Ask, Sampling, generate
from model.ops.settings import OpSettings
from rl.ledger import add, iteration_flops, ledger_metrics, pretrain_flops
from rl.messages import Sample, Stretch
from rl.packing import pack_samples
from tests.model import tiny
from tests.rl.samples import make_sample
from tests.train.counted import MODEL
from train.flops import Row, flops_per_token, selected_pairs, trunk_weights, visible_pairs
from train.stages import STAGES

GRPO = STAGES["grpo"]


def draw(net, prompts: list[tuple[int, ...]], group: int, new: int) -> list[Sample]:
    asks = [Ask(prompt, 10 * i + j, new) for i, prompt in enumerate(prompts) for j in range(group)]
    drawn = generate(net, asks, Sampling(), eos_id=MODEL.vocab_size + 1)
    return [
        make_sample(list(ask.prompt), found.ids, found.logprobs, prompt_index=n // group, sample_index=n % group)
        for n, (ask, found) in enumerate(zip(asks, drawn, strict=True))
    ]


def new(samples: list[Sample]) -> list[Stretch]:
    return [Stretch(sample, len(sample.request.prompt_ids)) for sample in samples]


def test_an_iteration_equals_what_torch_counts_but_for_what_is_named() -> None:
    net = tiny.tiny_net(MODEL).requires_grad_(False)
    net.use(OpSettings(workspace=1))
    prompts, group, size = [(1, 2, 3), (4, 5, 6)], 2, 8
    with FlopCounterMode(display=False) as counter:
        samples = draw(net, prompts, group, size)
    spent = iteration_flops(MODEL, GRPO, new(samples), samples[:2], reference=True)
    square = 2 * MODEL.num_hidden_layers * (9 - visible_pairs([3]))  # both prompts' masked halves
    a_pair = 2 * MODEL.num_attention_heads * (2 * MODEL.kv_lora_rank + MODEL.qk_rope_head_dim)
    assert counter.get_total_flops() == spent["rollout"] + square * a_pair

    (row,) = pack_samples(samples[:2], [1.0, -1.0], 22)
    shape = Row((11, 11), 16)
    assert int((row.labels >= 0).sum()) == shape.targets
    with FlopCounterMode(display=False) as counter:
        net(**row.inputs(), attention="sparse", mtp=False)
    assert counter.get_total_flops() == spent["reference"] + sum(
        beyond(MODEL, "grpo", shape, 22, False, False).values()
    )
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(".indexer." not in name and not name.startswith("mtp."))
    with FlopCounterMode(display=False) as counter:
        out = net(**row.inputs(), attention="sparse", mtp=False)
        assert out.token_logprobs is not None
        out.token_logprobs.sum().backward()
    assert counter.get_total_flops() == spent["update"] + sum(beyond(MODEL, "grpo", shape, 22, True, False).values())
    assert selected_pairs([11], MODEL.index_topk) < visible_pairs([11])  # the selection was a real one


def test_parts_that_did_not_happen_cost_nothing() -> None:
    samples = [make_sample([1, 2], [3, 4], [0.0, 0.0], sample_index=n) for n in range(2)]
    spent = iteration_flops(MODEL, GRPO, new(samples), [], reference=True)
    assert spent["rollout"] > 0 and spent["update"] == spent["reference"] == spent["reward"] == 0
    assert iteration_flops(MODEL, GRPO, new(samples), samples, reference=False)["reference"] == 0
    twice = iteration_flops(MODEL, GRPO, new(samples * 2), samples * 2, reference=True)
    once = iteration_flops(MODEL, GRPO, new(samples), samples, reference=True)
    assert twice == add(once, once)
    before = iteration_flops(MODEL, GRPO, new(samples), samples, reference=True, scored_before=samples)
    assert before == once | {"update": once["update"] + once["reference"]}  # log pi_old is one more forward


def test_the_share_is_logged_where_pretraining_is_known() -> None:
    ledger = {"rollout": 3.0, "update": 5.0, "reference": 2.0, "reward": 0.0}
    found = ledger_metrics(ledger, 100.0)
    assert found["flops/rl_over_pretrain"] == 0.1 and found["flops/update"] == 5.0
    assert "flops/rl_over_pretrain" not in ledger_metrics(ledger, None)


def write_run(folder: Path, stage: str, tokens: int | None, init_from: str | None = None) -> RunConfig:
    config = RunConfig(stage, str(folder), init_from, model=MODEL)
    folder.mkdir()
    save_yaml(config, folder / "config.yaml")
    rows = [{"step": 1, "tokens": 1}, {"step": 2, "tokens": tokens}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config


def test_the_runs_behind_add_up_each_by_its_own_stage(tmp_path: Path) -> None:
    write_run(tmp_path / "base", "pretrain", 5000)
    write_run(tmp_path / "warm", "dense_warmup", 300, str(tmp_path / "base" / "hf"))
    write_run(tmp_path / "sparse", "sparse_adapt", 700, str(tmp_path / "warm"))
    write_run(tmp_path / "first_rl", "grpo", 10**9, str(tmp_path / "sparse"))
    config = RunConfig("grpo", "runs/grpo", str(tmp_path / "first_rl"), model=MODEL)
    stages = {"pretrain": 5000, "dense_warmup": 300, "sparse_adapt": 700}
    known = sum(tokens * flops_per_token(MODEL, STAGES[name], 512) for name, tokens in stages.items())
    assert pretrain_flops(config) == (pytest.approx(known, rel=1e-12), "")


def test_the_users_count_goes_first() -> None:
    config = RunConfig("grpo", "runs/grpo", "some/checkpoint", model=MODEL, rl=RLConfig(pretrain_tokens=14.8e12))
    assert pretrain_flops(config) == (6 * trunk_weights(MODEL) * 14.8e12, "")


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    def reason(config: RunConfig) -> str:
        known, why = pretrain_flops(config)
        assert known is None
        return why

    start = RunConfig("grpo", "runs/grpo", str(tmp_path / "sparse"), model=MODEL)
    assert "is no run of this project" in reason(start)
    write_run(tmp_path / "sparse", "sparse_adapt", 700, "downloaded/checkpoint")
    assert reason(start) == "downloaded/checkpoint is no run of this project"
    (tmp_path / "sparse" / "config.yaml").write_text("stage: [")
    assert "is not YAML" in reason(start)
    write_run(tmp_path / "loop", "sft", 700, str(tmp_path / "loop"))
    assert "starts from itself" in reason(replace(start, init_from=str(tmp_path / "loop")))
    write_run(tmp_path / "mute", "pretrain", None)
    assert "counts no tokens" in reason(replace(start, init_from=str(tmp_path / "mute")))
    assert "no training run" in reason(replace(start, init_from=None))
