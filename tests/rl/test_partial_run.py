# ruff: noqa: F811  (`base` is a fixture)
"""Whole GRPO runs with partial rollouts: resumed to the same bits, the same on any number of ranks, and each group
trained in the iteration that finishes it."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rl.groups
import rl.loop
from conf.schema import ParallelConfig
from tests.rl.test_loop import FULL, assert_same_run, base, config, go, rows  # noqa: F401
from tests.train import runs
from train.checkpoint import newest

PARTIAL = replace(FULL, rollout_tokens=8, top_p=0.95)
DYNAMIC = replace(PARTIAL, dynamic_sampling=True, max_resample=2, group_size=2, prompts_per_step=8)


@pytest.fixture(autouse=True)
def shorter_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl.groups, "total_reward", lambda parts, rl: 1.0 - parts["length"])


@pytest.mark.parametrize("drawn", [PARTIAL, DYNAMIC], ids=["partial", "dynamic"])
def test_a_run_killed_with_samples_on_their_way_ends_in_the_same_bits(drawn: Any, base: str, tmp_path: Path):
    """Killed in iteration 5, between its rollout and its update; the checkpoint of iteration 4 has carried samples on
    both ranks, and iterations 5 and 6 train on them."""

    def die(iteration: int) -> None:
        if iteration == 5:
            runs.wait_for(saved)
            os._exit(9)

    saved = tmp_path / "killed/checkpoints/step_4"
    whole, killed = (config(tmp_path / name, base, rl=drawn) for name in ("whole", "killed"))
    assert go(whole, 2) == ["finished"] * 2
    with pytest.raises(AssertionError):
        go(killed, 2, die)
    assert newest(tmp_path / "killed") == saved
    assert go(killed, 2) == ["finished"] * 2
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    found = rows(tmp_path / "whole")
    assert found[3]["rollout/carried"] > 0 and found[4]["rollout/staleness_mean"] > 0
    assert 0 < found[4]["rollout/staleness_mean"] < 1 and not found[0]["rollout/staleness_mean"]
    assert all("mismatch/route_agree" in row for row in found if "loss/policy" in row)


def test_sigterm_saves_what_is_on_its_way(base: str, tmp_path: Path):
    def terminate(iteration: int) -> None:
        if iteration == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    whole, stopped = (config(tmp_path / name, base, rl=PARTIAL, save_every=5) for name in ("whole", "stopped"))
    assert go(whole) == ["finished"]
    assert go(stopped, hook=terminate) == ["exit 143"]
    assert go(stopped) == ["finished"]
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


LAYOUTS = {
    "2": (2, {"zero": 1}),
    "4": (4, {"zero": 2}),
    "2-zero3": (2, {"zero": 3, "persist_below": 0}),
    "2-cp2": (2, {"zero": 2, "cp": 2}),
}


@pytest.fixture(scope="module")
def alone(base: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl.groups, "total_reward", lambda parts, rl: 1.0 - parts["length"])
        assert go(config(folder, base, rl=DYNAMIC, steps=4)) == ["finished"]
    return rows(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_number_of_ranks_takes_the_iterations_of_one(layout: str, alone: list, base: str, tmp_path: Path):
    world, fields = LAYOUTS[layout]
    run = config(tmp_path / "run", base, rl=DYNAMIC, steps=4, parallel=ParallelConfig(**fields))
    assert go(run, world) == ["finished"] * world
    assert sum(row["rollout/carried"] for row in alone) > 0 and any(
        row.get("rollout/resampled_groups") for row in alone
    )
    for one, other in zip(alone, rows(tmp_path / "run"), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            near = value if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)
            assert other[name] == near, (one["step"], name)


def test_each_prompt_of_the_stream_is_trained_once_when_its_group_is_whole(
    base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    told = tmp_path / "told"
    told.mkdir()
    improve = rl.loop.improve

    def watched(*args: Any) -> dict[str, float]:
        seen = [
            [s.request.prompt_index, s.request.sample_index, s.request.prompt, s.num_sampled, s.tokens.weight_versions]
            for s in args[2].trained
        ]
        (told / str(args[-1].step)).write_text(json.dumps(seen))
        return improve(*args)

    monkeypatch.setattr(rl.loop, "improve", watched)
    run = config(tmp_path / "run", base, rl=replace(PARTIAL, rollout_tokens=3), steps=8)
    assert go(run) == ["finished"]
    begun: dict[str, int] = {}
    for row in rows(tmp_path / "run"):
        now = row["step"] - 1
        seen = json.loads((told / str(now)).read_text())
        groups: dict[str, list] = {}
        for index, member, prompt, size, versions in seen:
            groups.setdefault(prompt, []).append(member)
            start = versions[-size]
            # it drew three tokens by the weights of each iteration until it was finished, and then waited
            assert versions[-size:] == [start + n // 3 for n in range(size)] and index < 4 and start <= now
            assert begun.setdefault(prompt, start) == start
        ends = {prompt: max(v[-1] for _, _, p, _, v in seen if p == prompt) for prompt in groups}
        assert all(members == [0, 1, 2, 3] for members in groups.values())
        assert all(end == now for end in ends.values())
        stale = [now - v for _, _, _, size, versions in seen for v in versions[-size:]]
        assert row["rollout/staleness_mean"] == pytest.approx(sum(stale) / len(stale) if stale else None)
    assert len(begun) >= 6


def test_an_iteration_without_a_finished_group_takes_no_step_and_is_no_fault(
    base: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
):
    """One token an iteration, at least two a group: the first iteration has nothing to train on."""
    run = config(tmp_path / "run", base, rl=replace(PARTIAL, rollout_tokens=1), steps=3, max_skipped_steps=0)
    assert go(run) == ["finished"]
    found = rows(tmp_path / "run")
    assert "loss/policy" not in found[0] and found[0]["rollout/carried"] >= 12 and found[0]["reward/mean"] is None
    idle = [row["rollout/idle_iterations"] for row in found]
    assert idle[0] == 1 and idle == sorted(idle) and all(row["optim/skipped_steps"] == 0 for row in found)
    assert capfd.readouterr().out.count("no optimiser step, every group is still unfinished") == idle[-1]
    assert found[1]["flops/rollout"] > found[0]["flops/rollout"] > 0 and found[0]["flops/update"] == 0


def test_failed_grades_are_still_a_fault(base: str, tmp_path: Path):
    wrong = [{"prompt": f"{n}?", "answer": "no number"} for n in range(90)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in wrong))
    drawn = replace(PARTIAL, path=str(path), outcome="math_verify", mini_batches=1)
    with pytest.raises(AssertionError, match="no group whose grades are whole; 2 steps were left out"):
        go(config(tmp_path / "run", base, rl=drawn, max_skipped_steps=1))


def test_a_failed_group_makes_no_fault_of_mini_batches_that_are_left_empty(base: str, tmp_path: Path):
    """As many mini-batches as samples, of which some groups' are left out: the rest is trained on."""
    given = [{"prompt": f"{n}?", "answer": "no number" if n % 3 else "7"} for n in range(90)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    drawn = replace(PARTIAL, rollout_tokens=None, path=str(path), outcome="math_verify", mini_batches=16)
    assert go(config(tmp_path / "run", base, rl=drawn, steps=2, max_skipped_steps=0)) == ["finished"]
    found = rows(tmp_path / "run")
    assert [0 < row["reward/failed_groups"] < 4 and "loss/policy" in row for row in found] == [True, True]
    assert found[-1]["optim/skipped_steps"] == 0
