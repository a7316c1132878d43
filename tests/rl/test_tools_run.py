# ruff: noqa: F811  (`base` is a fixture)
"""GRPO with tools, whole runs: repeatable, on any number of ranks, across a kill, with rows that fork, beside prompts
without tools. The policy is random, so what it says is taken for calls by a checksum of it."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rl.groups
import rl.offer
import rl.rollout.tool_loop
import rl.rollout.trajectory
from conf.schema import ENVIRONMENT_LEVELS, DomainConfig, RLConfig, ToolsConfig
from data.calls import ToolCall
from data.dsml import Turn
from rl.env.registry import ENVIRONMENTS
from tests.rl.test_loop import RL, base, config, go, rows  # noqa: F401
from tests.rl.test_tool_loop import EchoWorld
from tests.train import runs
from train.checkpoint import newest

TOOLS = replace(
    RL,
    env="echo:1",
    outcome="environment",
    max_new_tokens=24,
    pack_len=160,
    mini_batches=2,
    beta=0.1,
    off_policy_delta=0.5,
    tools=ToolsConfig(max_turns=5),
)


def taken_for_calls(text: str, thinking: bool = True) -> Turn:
    """Two messages in three call echo with some of what they say."""
    number = zlib.crc32(text.encode())
    said = "".join(c for c in text if c.isascii() and c.isalnum())[:3]
    calls = (ToolCall("echo", {"text": said or "yes"}),) if number % 3 else ()
    return Turn(said, "" if calls else "done", calls)


def without_calls(turn: Turn) -> dict[str, Any]:
    """A call, encoded anew in bytes, takes 200 tokens."""
    return {"role": "assistant", "content": turn.content, "reasoning_content": turn.reasoning}


@pytest.fixture(autouse=True)
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENT_LEVELS, "echo", 1)
    monkeypatch.setitem(ENVIRONMENTS, "echo", EchoWorld(more=1))
    monkeypatch.setattr(rl.rollout.tool_loop, "parse_turn", taken_for_calls)
    monkeypatch.setattr(rl.rollout.trajectory, "said_message", without_calls)
    monkeypatch.setattr(rl.offer.Offer, "schemas", lambda *_: [])  # which in bytes are longer than all the rest
    monkeypatch.setattr(rl.groups, "total_reward", lambda parts, rl: parts.get("environment", 0.0) - parts["length"])


def timeless(found: Any) -> Any:
    """Without what a clock decides."""
    if isinstance(found, dict):
        return {k: timeless(v) for k, v in found.items() if k not in ("seconds", "tool/seconds_mean")}
    return [timeless(v) for v in found] if isinstance(found, list) else found


def shown(folder: Path) -> list[dict[str, Any]]:
    return timeless([json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()])


def assert_same_run(one: Path, other: Path) -> None:
    assert timeless(rows(one)) == timeless(rows(other)) and shown(one) == shown(other)
    mine, theirs = runs.weights(one), runs.weights(other)
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize("reasoning", ["v3_2", "drop"])
def test_a_run_with_tools_repeats_and_does_not_depend_on_the_ranks(reasoning: str, base: str, tmp_path: Path):
    drawn = replace(TOOLS, tools=replace(TOOLS.tools, reasoning=reasoning))
    for name, world in (("one", 1), ("again", 1), ("two", 2)):
        assert go(config(tmp_path / name, base, rl=drawn, steps=3), world) == ["finished"] * world
    assert_same_run(tmp_path / "one", tmp_path / "again")
    for one, two in zip(timeless(rows(tmp_path / "one")), timeless(rows(tmp_path / "two")), strict=True):
        for name, value in one.items():
            # sums in another order, which Adam's first steps, nearly signs of the gradient, make larger
            assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
        assert one["tool/calls_mean"] > 0.3 and 0 < one["tool/calling_frac"] <= 1 and one["tool/error_frac"] == 0
        assert one["tool/rows_mean"] > 1, "the user's message begins a row"
        assert one["mismatch/k3"] < 1e-8, "the trainer finds the sampler's log-probs behind results and forks"
        assert one["mismatch/route_agree"] == 1.0 and one["rollout/missing_logprobs"] == 0
    found = [row for row in shown(tmp_path / "one") if row["num_calls"]]
    assert found and all(row["per_token"]["between"] and row["per_token"]["text"] is not None for row in found)
    assert all(len(row["per_token"]["logprobs"]) == row["tokens"] for row in found if row["per_token"]["logprobs"])


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "one step off"])
def test_a_killed_run_ends_in_the_same_bits(ahead: bool, base: str, tmp_path: Path):
    """Killed in iteration 3; one step off, the trajectories of iteration 3 wait in the checkpoint of iteration 2."""
    drawn = replace(TOOLS, one_step_off=ahead)
    saved = tmp_path / "killed/checkpoints/step_2"

    def die(iteration: int) -> None:
        if iteration == 3:
            runs.wait_for(saved)
            os._exit(9)

    whole, killed = (config(tmp_path / name, base, rl=drawn, steps=4) for name in ("whole", "killed"))
    assert go(whole) == ["finished"]
    with pytest.raises(AssertionError):
        go(killed, 1, die)
    assert newest(tmp_path / "killed") == saved
    assert go(killed) == ["finished"]
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_domains_with_and_without_tools_in_one_run(base: str, tmp_path: Path):
    """Each has its outcome; held-out accuracy is measured of both, and evaluate finds the same."""
    domains = {
        "echo": DomainConfig(env="echo:1", outcome="environment"),
        "bare": DomainConfig(env="echo:1", outcome="environment", use_tools=False),
        "sums": DomainConfig(tasks=("arithmetic:1",), max_new_tokens=8),
    }
    drawn: RLConfig = replace(TOOLS, env=None, outcome="exact_match", domains=domains, prompts_per_step=6, eval_every=2)
    drawn = replace(drawn, eval_prompts=6)
    run = config(tmp_path / "run", base, rl=drawn, steps=2)
    assert go(run, 2) == ["finished"] * 2
    *_, last = rows(tmp_path / "run")
    assert {f"domain/{name}/accuracy" for name in domains} <= set(last)
    assert last["reward/environment"] >= 0 and last["reward/exact_match"] >= 0
    evaluation = config(tmp_path / "eval", str(tmp_path / "run"), "evaluate", rl=drawn)
    short = replace(evaluation.train, eval_sequences=2)
    assert go(replace(evaluation, train=short, data=replace(evaluation.data, seq_len=64))) == ["finished"]
    measured = json.loads((tmp_path / "eval/evaluation.json").read_text())
    for name in domains:
        assert measured[f"domain/{name}/accuracy"] == last[f"heldout/{name}/accuracy"]
    assert measured["tool/calls_mean"] > 0


def test_a_verifier_that_fails_is_a_failed_grade(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its group is left out and counted; the run goes on."""
    world = EchoWorld()
    monkeypatch.setitem(ENVIRONMENTS, "echo", world)
    verify: Callable[..., Any] = world.verify

    async def sometimes(problem: Any, answer: str, tools: Any) -> float:
        if problem.prompt.endswith(("1", "4")):
            raise RuntimeError("broken")
        return await verify(problem, answer, tools)

    monkeypatch.setattr(world, "verify", sometimes)
    assert go(config(tmp_path / "run", base, rl=TOOLS, steps=2)) == ["finished"]
    found = rows(tmp_path / "run")
    assert found[0]["reward/failed_groups"] > 0 and all("loss/policy" in row for row in found)
