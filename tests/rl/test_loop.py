"""Whole GRPO runs of the tiny model: learning, resume to the same bits, one rank against two; the evaluate stage."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import rl.evaluate
import rl.groups
import rl.loop
from conf.schema import DomainConfig, EvalConfig, ParallelConfig, PrecisionConfig, RLConfig, RunConfig
from data.tokenizer import END_THINK, EOS
from rl.rewards import part_names
from tests.distributed.helper import run_ranks
from tests.rl.models import saved, saying
from tests.train import runs, tiny
from train import shards
from train.checkpoint import newest, step_folders
from train.flops import trunk_weights
from train.run import open_run

Hook = Callable[[int], None]
RL = RLConfig(prompts_per_step=4, group_size=4, max_new_tokens=12, pack_len=48, record_selection=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that ends its answers at many lengths, so that rewards differ inside a group."""
    return saved(tmp_path_factory.mktemp("base"), saying({EOS: 8, END_THINK: 8}))


@pytest.fixture(autouse=True)
def shorter_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model is never right, so nothing would train it; processes are forked and see this reward."""
    monkeypatch.setattr(rl.groups, "total_reward", lambda parts, rl: 1.0 - parts["length"])


def config(folder: Path, base: str, stage: str = "grpo", rl: RLConfig = RL, **changes: Any) -> RunConfig:
    return replace(runs.config(folder, stage, init_from=base, micro_batches=1, **changes), rl=rl)


def _run(run: RunConfig, hook: Hook | None) -> str:
    improve = rl.loop.improve

    def hooked(*args: Any) -> dict[str, float]:
        if hook is not None:
            hook(args[-1].step + 1)
        return improve(*args)

    rl.loop.improve = hooked  # this process alone
    context = open_run(run, frozenset())
    if context is None:
        return "finished before"
    try:
        with context:
            (rl.loop.run if run.stage == "grpo" else rl.evaluate.run)(context)
    except SystemExit as end:
        return f"exit {end.code}"
    return "finished"


def go(run: RunConfig, world: int = 1, hook: Hook | None = None) -> list[str]:
    return run_ranks(_run, world, run, hook)


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or the memory decides."""
    measured = ("perf/", "rollout/tokens_per_s")
    return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in runs.rows(folder)]


def assert_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    assert (one / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    mine, theirs = runs.weights(one), runs.weights(other)
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


FULL = replace(RL, mini_batches=2, beta=0.1, reference_refresh=3, off_policy_delta=0.5)
OPTIONS = replace(
    FULL,
    beta=0.0,
    domains={"arithmetic": DomainConfig(beta=0.1)},
    loss_mean="token",
    old_logprobs="trainer",
    importance_cap=2.0,
    group_size=2,  # often equal
    dynamic_sampling=True,
    max_resample=2,
)


@pytest.mark.parametrize("rl", [FULL, OPTIONS], ids=["full", "options"])
def test_a_killed_run_ends_in_the_same_bits(rl: RLConfig, base: str, tmp_path: Path):
    """Killed in iteration 5, between its rollout and its update; checkpoints are every second iteration, the reference
    that iterations 4 to 6 need was taken after the third."""

    def die(iteration: int) -> None:
        if iteration == 5:
            runs.wait_for(saved)  # it may still be in flight
            os._exit(9)

    saved = tmp_path / "killed/checkpoints/step_4"
    whole, killed = (config(tmp_path / name, base, rl=rl) for name in ("whole", "killed"))
    assert go(whole, 2) == ["finished"] * 2
    with pytest.raises(AssertionError):
        go(killed, 2, die)
    assert newest(tmp_path / "killed") == saved
    assert go(killed, 2) == ["finished"] * 2
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert [row["step"] for row in rows(tmp_path / "killed")] == [1, 2, 3, 4, 5, 6]
    found = rows(tmp_path / "whole")
    assert found[0]["policy/kl_ref"] > 0 and found[0]["optim/grad_norm"] > 0  # the second mini-batch has moved away
    costs = [row["flops/rollout"] + row["flops/update"] for row in found]
    assert costs == sorted(costs) and costs[-1] > 5 * costs[0] and found[-1]["flops/reference"] > 0
    assert "flops/rl_over_pretrain" not in found[0]  # nobody said what made the base
    references = sorted(path.name for path in (tmp_path / "whole" / "reference").iterdir())
    assert references == ["step_3.safetensors", "step_6.safetensors"]
    if rl.dynamic_sampling:
        assert sum(row["rollout/resampled_groups"] for row in found) > 0
        assert found[0]["policy/importance_mean"] == pytest.approx(1, abs=1e-4)  # the sampler is the trainer here


def test_a_save_in_flight_keeps_its_reference(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Iteration 6 takes another reference while step 4, which needs that of iteration 3, is still being written."""
    real = shards.write

    def write(folder: Path, rank: int, tensors: dict) -> object:
        if folder.name == ".tmp_step_4":
            runs.wait_for(tmp_path / "six")
            time.sleep(2.0)
        return real(folder, rank, tensors)

    def hook(iteration: int) -> None:
        if iteration == 6:
            (tmp_path / "six").touch()

    monkeypatch.setattr(shards, "write", write)
    assert go(config(tmp_path / "run", base, rl=FULL), hook=hook) == ["finished"]
    assert list(step_folders(tmp_path / "run/checkpoints")) == [4, 6]
    references = sorted(path.name for path in (tmp_path / "run/reference").iterdir())
    assert references == ["step_3.safetensors", "step_6.safetensors"]


def test_the_indexer_the_router_bias_and_mtp_stay_and_the_rest_learns(base: str, tmp_path: Path):
    assert go(config(tmp_path / "run", base, steps=2)) == ["finished"]
    before, after = load_file(Path(base) / "model.safetensors"), runs.weights(tmp_path / "run")
    mtp = f"model.layers.{tiny.MODEL.num_hidden_layers}."
    still = {n for n in before if ".indexer." in n or n.startswith(mtp) or n.endswith("e_score_correction_bias")}
    still -= {f"{mtp}embed_tokens.weight", f"{mtp}shared_head.head.weight"}  # copies of the main ones
    assert still and all(torch.equal(before[name], after[name]) for name in still)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight"} <= moved


LAYOUTS = {
    "2": (2, {"zero": 1}),
    "2-zero3": (2, {"zero": 3, "persist_below": 0}),
    "2-cp2": (2, {"zero": 2, "cp": 2}),
    "2-ep2": (2, {"zero": 1, "ep": 2}),
    "4-zero3-ep2-cp2": (4, {"zero": 3, "ep": 2, "cp": 2, "persist_below": 0}),
    "2-zero3-ep2-offload": (2, {"zero": 3, "ep": 2, "persist_below": 0, "offload": "cpu", "offload_parameters": True}),
}


@pytest.fixture(scope="module")
def alone(base: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two iterations of one rank: two mini-batches, a reference, the sampler's words and selections repeated."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl.groups, "total_reward", lambda parts, rl: 1.0 - parts["length"])
        assert go(config(folder, base, rl=EVERYTHING, steps=2)) == ["finished"]
    return rows(folder)


EVERYTHING = replace(
    RL,
    mini_batches=2,
    beta=0.1,
    reference_refresh=1,
    top_p=0.95,
    keep_selection=True,
    old_logprobs="trainer",
    importance_cap=2.0,
    off_policy_delta=0.5,
    dynamic_sampling=True,
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_takes_the_iterations_of_one_rank(layout: str, alone: list, base: str, tmp_path: Path):
    """The same samples, rewards and losses: rollouts run on a copy where the trainer's weights are cut, and ranks that
    share a sequence roll out prompts of their own."""
    world, fields = LAYOUTS[layout]
    run = config(tmp_path / "run", base, rl=EVERYTHING, steps=2, parallel=ParallelConfig(**fields))
    assert go(run, world) == ["finished"] * world
    assert alone[0]["reward/zero_spread_frac"] < 1 and alone[0]["mismatch/k3"] < 1e-9
    assert alone[1]["policy/kl_ref"] > 0
    for one, other in zip(alone, rows(tmp_path / "run"), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (one["step"], name)


def test_a_metric_that_some_mini_batches_lack_is_averaged_over_the_rest():
    found = rl.loop.mean_rows([{"a": 1.0}, {"a": 2.0, "mismatch/index_overlap": 0.5}, {"a": 6.0}])
    assert found == {"a": 3.0, "mismatch/index_overlap": 0.5}
    assert rl.loop.mean_rows([]) == {}


@pytest.mark.parametrize(("first", "then"), [("2", "2-zero3"), ("2-zero3", "2-cp2"), ("2-ep2", "2")])
def test_a_run_goes_on_in_another_layout(first: str, then: str, base: str, tmp_path: Path):
    """On as many ranks, with a reference that was refreshed: whole or cut, it is the same policy."""

    def die(iteration: int) -> None:
        if iteration == 5:
            os._exit(9)

    def run(name: str, layout: str) -> RunConfig:
        return config(tmp_path / name, base, rl=FULL, parallel=ParallelConfig(**LAYOUTS[layout][1]))

    assert go(run("whole", first), 2) == ["finished"] * 2
    with pytest.raises(AssertionError):
        go(run("changed", first), 2, die)
    assert go(run("changed", then), 2) == ["finished"] * 2
    for one, other in zip(rows(tmp_path / "whole"), rows(tmp_path / "changed"), strict=True):
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=1e-3, abs=1e-5), (one["step"], name)


def test_pi_old_of_the_trainer_is_from_before_the_first_step(base: str, tmp_path: Path):
    """The sampler here is the trainer but for rounding, so either pi_old gives the same second step, off policy."""
    found = {}
    for whose, cap in (("sampler", None), ("trainer", 2.0)):
        rl = replace(RL, mini_batches=2, old_logprobs=whose, importance_cap=cap)
        run = config(tmp_path / whose, base, rl=rl, steps=1)
        assert go(replace(run, optim=replace(run.optim, lr=1e-2))) == ["finished"]
        (found[whose],) = rows(tmp_path / whose)
    assert abs(found["sampler"]["policy/ratio_mean"] - 1) > 1e-3
    assert found["trainer"]["flops/update"] > found["sampler"].pop("flops/update")
    for name, value in found["sampler"].items():
        assert found["trainer"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_groups_of_equal_rewards_are_replaced_until_rewards_differ_or_the_rounds_end(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Rewards by the seed of the sample's group alone: of four prompts two are equal, then one, then none; one rank and
    two draw the same and train on the same places."""
    told = tmp_path / "told"
    told.mkdir()

    def grade(samples: list[Any], pool: Any, rl: RLConfig, client: None) -> tuple[list[Any], list[str]]:
        equal = {1, 3, 5}  # 5 = 4 + 1: the first to take place 1; 7 takes place 3, 9 place 1 again
        graded = []
        for sample in samples:
            request = sample.request
            (told / f"{request.prompt_index}_{request.sample_index}").write_text(f"{request.answer} {request.seed}")
            reward = 1.0 if request.prompt_index in equal else float(request.sample_index == 0)
            graded.append(replace(sample, reward_parts=dict.fromkeys(rl_parts, 1.0), reward=reward))
        return graded, []

    improve = rl.loop.improve

    def improve_and_tell(*args: Any) -> dict[str, float]:
        trained = sorted({sample.request.prompt_index for sample in args[2].trained})
        (tmp_path / f"trained_{dist.get_rank()}").write_text(json.dumps(trained))
        return improve(*args)

    rl_parts = part_names(RL)
    monkeypatch.setattr(rl.loop, "grade", grade)
    monkeypatch.setattr(rl.loop, "improve", improve_and_tell)
    found = {}
    for world, rounds in ((1, 3), (2, 3), (1, 1)):
        folder = tmp_path / f"{world}_{rounds}"
        drawn = replace(RL, group_size=2, dynamic_sampling=True, max_resample=rounds)
        assert go(config(folder, base, rl=drawn, steps=1), world) == ["finished"] * world
        (found[world, rounds],) = rows(folder)
        prompts = sorted({int(path.name.split("_")[0]) for path in told.iterdir()})
        assert prompts == ([0, 1, 2, 3, 5, 7, 9] if rounds == 3 else [0, 1, 2, 3, 5, 7])
        trained = [json.loads((tmp_path / f"trained_{rank}").read_text()) for rank in range(world)]
        assert sorted(sum(trained, [])) == ([0, 2, 7, 9] if rounds == 3 else [0, 2, 5, 7])
        content = {path.name: path.read_text() for path in told.iterdir()}
        assert len({text.split()[1] for text in content.values()}) == len(content)  # every sample has a seed of its own
        for path in told.iterdir():
            path.unlink()
        assert content.items() <= found.setdefault("content", content).items()
    one, two, short = found[1, 3], found[2, 3], found[1, 1]  # in `short` place 1 ends with a group of equal rewards
    assert one["rollout/resampled_groups"] == 3 and short["rollout/resampled_groups"] == 2
    assert one["reward/zero_spread_frac"] == pytest.approx(3 / 7)
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert one["loss/policy"] != short["loss/policy"]


def test_every_group_equal_ends_after_the_rounds(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rl.groups, "total_reward", lambda parts, rl: 1.0)
    drawn = replace(RL, dynamic_sampling=True, max_resample=2)
    assert go(config(tmp_path / "run", base, rl=drawn, steps=1), 2) == ["finished"] * 2
    (row,) = rows(tmp_path / "run")
    assert row["rollout/resampled_groups"] == 8 and row["reward/zero_spread_frac"] == 1
    assert row["loss/policy"] == 0 and row["optim/grad_norm"] == 0


def test_samples_show_what_was_drawn_graded_and_trained(base: str, tmp_path: Path):
    """Two mini-batches: the first is on policy, the second has moved. The text of the tokens is the sample's."""
    run = config(tmp_path / "run", base, rl=replace(RL, mini_batches=2, top_p=0.95, off_policy_delta=1e-3), steps=2)
    assert go(replace(run, optim=replace(run.optim, lr=1e-2)), 2) == ["finished"] * 2
    shown = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt_index"]) for row in shown] == [(1, 0)] * 4 + [(1, 2)] + [(2, 0)] * 4 + [(2, 2)]
    for row in shown:
        told = row["per_token"]
        assert "".join(told["text"]) == row["text"] and row["weight_versions"] == [row["step"] - 1]
        assert told.pop("between") == []
        assert {len(column) for column in told.values()} == {row["tokens"]} and max(filter(None, told["kept"])) < 256
        assert row["off_policy_masked"] is (row["advantage"] < 0 and row["off_policy_kl"] > 1e-3)
        gaps = [old - new for old, new in zip(told["behaviour_logprobs"], told["logprobs"], strict=True)]
        assert row["off_policy_kl"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)
        assert [math.exp(-gap) for gap in gaps] == pytest.approx(told["ratios"], rel=1e-4)
        assert (row["max_log_ratio"] < 1e-4) is (row["prompt_index"] == 0)  # of the first mini-batch
    assert any(row["clip_frac"] for row in shown)


def test_the_measure_of_eq_9_is_logged_for_every_delta(base: str, tmp_path: Path):
    """On policy it is rounding; after a step it has moved, and a delta of 0 masks what lies above it."""
    run = config(tmp_path / "run", base, rl=replace(RL, mini_batches=2, off_policy_delta=0.0), steps=2)
    assert go(replace(run, optim=replace(run.optim, lr=1e-2)), 2) == ["finished"] * 2
    for row in rows(tmp_path / "run"):
        spread = [row[f"policy/off_policy_kl_{name}"] for name in ("p50", "p90", "p99", "max")]
        assert spread == sorted(spread) and spread[-1] > 1e-3
        assert 0 < row["policy/off_policy_above_delta_frac"] <= 1
    run = config(tmp_path / "first", base, steps=1)
    assert go(run) == ["finished"]
    (row,) = rows(tmp_path / "first")
    assert row["policy/off_policy_kl_max"] < 1e-4 and "policy/off_policy_above_delta_frac" not in row


def test_a_strength_for_an_unknown_domain_is_refused(base: str, tmp_path: Path):
    run = config(tmp_path / "run", base, rl=replace(RL, domains={"arithmetics": DomainConfig(beta=0.1)}))
    with pytest.raises(
        AssertionError, match=r"names arithmetics, a domain without any prompt: did you mean arithmetic\?"
    ):
        go(run, 2)


def test_the_policy_finds_what_is_rewarded(base: str, tmp_path: Path):
    run = config(tmp_path / "run", base, rl=replace(RL, group_size=8, pretrain_tokens=1e6), steps=15, save_every=100)
    run = replace(run, optim=replace(run.optim, lr=1e-2))
    assert go(run) == ["finished"]
    last = rows(tmp_path / "run")[-1]
    spent = sum(last[f"flops/{part}"] for part in ("rollout", "update", "reference", "reward"))
    assert last["flops/rl_over_pretrain"] == pytest.approx(spent / (6e6 * trunk_weights(run.model)), rel=1e-12)
    full = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["perf/model_tflops"] > 0 for row in full)
    found = [row["reward/mean"] for row in rows(tmp_path / "run")]
    assert sum(found[-3:]) / 3 > sum(found[:3]) / 3 + 0.1, found


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_the_reference_is_the_policy_at_first(precision: str, base: str, tmp_path: Path):
    """To the bit, since both run the same forward on the same rows; then the policy moves away."""
    run = config(tmp_path / "run", base, rl=replace(RL, beta=0.1), steps=3)
    assert go(replace(run, precision=PrecisionConfig(precision))) == ["finished"]
    first, _, third = (row["policy/kl_ref"] for row in rows(tmp_path / "run"))
    assert first == 0 and third > 0
    assert rows(tmp_path / "run")[0]["mismatch/k3"] < (1e-10 if precision == "fp32" else 1e-5)


def test_at_rate_zero_every_mismatch_stays_flat(base: str, tmp_path: Path):
    """With the sampler's words, experts and positions repeated nothing but rounding is left between it and the trainer,
    in the last iteration as in the first; without the words it is off policy from the start."""
    rl = replace(RL, top_p=0.9, temperature=0.9, keep_selection=True, mini_batches=2)
    for name, changed in (("kept", rl), ("dropped", replace(rl, keep_sampling_mask=False))):
        run = config(tmp_path / name, base, rl=changed, steps=4)
        assert go(replace(run, optim=replace(run.optim, lr=1e-30))) == ["finished"]
    for row in rows(tmp_path / "kept"):
        assert row["mismatch/k3"] < 1e-9 and row["mismatch/route_agree"] == row["mismatch/index_overlap"] == 1.0
        assert row["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-4) and row["policy/clip_frac"] == 0
    assert all(row["mismatch/k3"] > 1e-3 for row in rows(tmp_path / "dropped"))


def test_sigterm_saves_and_the_run_goes_on(base: str, tmp_path: Path):
    def terminate(iteration: int) -> None:
        if iteration == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    whole, stopped = (config(tmp_path / name, base, save_every=5) for name in ("whole", "stopped"))
    assert go(whole) == ["finished"]
    assert go(stopped, hook=terminate) == ["exit 143"]
    assert (tmp_path / "stopped" / "preempted").read_text() == "step 3\n"
    assert go(stopped) == ["finished"]
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_evaluate_measures_without_training(base: str, tmp_path: Path):
    run = config(tmp_path / "run", base, "evaluate", replace(RL, eval_prompts=20))
    run = replace(run, train=replace(run.train, eval_sequences=3), data=replace(run.data, seq_len=40))
    run = replace(run, eval=EvalConfig(tasks=("needle",), lengths=(120,), depths=2, problems=3, k_sweep=(2,)))
    assert go(run, 2) == ["finished"] * 2
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    cells = [(each["task"], each["length"], each["depth"], each["n"]) for each in found["tasks"]]
    assert cells == [("needle", 120, 0.0, 3), ("needle", 120, 1.0, 3)]
    assert [(each["k"], each["n"]) for each in found["k_sweep"]] == [(2, 6)]
    assert 0 <= found["tasks/needle/sparse"] <= 1
    (row,) = runs.rows(tmp_path / "run")
    expected = {"loss/lm_dense", "loss/lm_sparse", "indexer/kl_captured", "indexer/mass_recall", "reward/accuracy"}
    expected |= {"indexer/recall_of_oracle", "indexer/layer_01/recall_of_oracle", "rollout/length_mean"}
    assert expected <= row.keys() and expected | {"perf/tokens_per_s", "perf/peak_memory_bytes"} <= found.keys()
    assert found["reward/num_problems"] == 20 and 0 <= found["reward/accuracy"] <= 1
    assert {name: found[name] for name in row if name != "step"} == {k: v for k, v in row.items() if k != "step"}


def test_a_mix_of_tasks_is_graded_by_domain(base: str, tmp_path: Path):
    rl = replace(RL, tasks=("words", "countdown", "counting"), outcome="task", pack_len=128, prompts_per_step=8)
    rl = replace(rl, eval_prompts=30)
    run = config(tmp_path / "run", base, rl=rl, steps=2)
    assert go(run) == ["finished"]
    assert [row["reward/failed_grades"] for row in rows(tmp_path / "run")] == [0, 0]
    shown = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {row["domain"] for row in shown} == {"words", "countdown", "counting"}
    run = config(tmp_path / "eval", base, "evaluate", rl)
    run = replace(run, train=replace(run.train, eval_sequences=2), data=replace(run.data, seq_len=40))
    assert go(run) == ["finished"]
    found = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    assert found["reward/num_problems"] == 30 and found["reward/task"] == found["reward/accuracy"]


def test_graders_that_always_fail_end_the_run(base: str, tmp_path: Path):
    rows_without_number = [{"prompt": f"{n}?", "answer": "no number"} for n in range(40)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_without_number))
    rl = replace(RL, path=str(path), outcome="math_verify")
    with pytest.raises(AssertionError, match="no group whose grades are whole; 3 steps were left out"):
        go(config(tmp_path / "run", base, rl=rl, max_skipped_steps=2))
    assert [row["reward/mean"] for row in rows(tmp_path / "run")] == [None, None]
    assert rows(tmp_path / "run")[0]["reward/failed_groups"] == 4
