# ruff: noqa: F811  (`base` is a fixture)
"""Rollouts beside the update: the same bits whenever the thread runs, after a kill and a SIGTERM, on any number of
ranks; its errors end the run."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rl.groups
import rl.loop
import rl.rollouts
from conf.schema import ParallelConfig, PrecisionConfig, RLConfig
from rl.rollout.beside import Beside
from rl.rollout.native import NativeEngine
from tests.rl.test_loop import FULL, assert_same_run, base, config, go, rows  # noqa: F401
from tests.train import runs
from train.checkpoint import newest

AHEAD = replace(FULL, one_step_off=True, top_p=0.95, old_logprobs="trainer", importance_cap=2.0)
BOTH = replace(AHEAD, rollout_tokens=8)


@pytest.fixture(autouse=True)
def shorter_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl.groups, "total_reward", lambda parts, rl: 1.0 - parts["length"])


class AtOnce:
    """No thread: the work is done before the update."""

    def __init__(self, work: Callable[..., Any], device: torch.device) -> None:
        self.found = work(lambda *_: None)

    def result(self) -> Any:
        return self.found

    def cancel(self) -> None: ...


class AtLast(AtOnce):
    """No thread: the work is done after the update."""

    def __init__(self, work: Callable[..., Any], device: torch.device) -> None:
        self.work = work

    def result(self) -> Any:
        return self.work(lambda *_: None)


class Slow(Beside):
    """A thread that waits before it begins: most of it runs after the update."""

    def _run(self) -> None:
        time.sleep(0.4)
        super()._run()


class Interleaved(Beside):
    """A thread that pauses after every token: it runs all through the update."""

    def _check(self, *_: object) -> None:
        super()._check()
        time.sleep(0.02)


TIMINGS = {"at once": AtOnce, "at last": AtLast, "slow": Slow, "interleaved": Interleaved}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("drawn", [AHEAD, BOTH], ids=["whole", "partial"])
def test_no_timing_changes_a_bit(
    drawn: RLConfig, precision: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def run(name: str) -> None:
        # a rate that moves the weights far in each update: what is read too late or too early shows
        made = config(tmp_path / name, base, rl=drawn, steps=4)
        made = replace(made, precision=PrecisionConfig(precision), optim=replace(made.optim, lr=1e-2))
        assert go(made) == ["finished"]

    run("thread")
    for name, kind in TIMINGS.items():
        monkeypatch.setattr(rl.rollouts, "Beside", kind)
        run(name)
        assert_same_run(tmp_path / "thread", tmp_path / name)
    found = rows(tmp_path / "thread")
    if drawn is AHEAD:
        assert [row["rollout/staleness_mean"] for row in found] == [0, 1, 1, 1]
        shown = [json.loads(line) for line in (tmp_path / "thread/samples.jsonl").read_text().splitlines()]
        assert {(row["step"], *row["weight_versions"]) for row in shown} == {(1, 0), (2, 0), (3, 1), (4, 2)}
    assert found[1]["policy/off_policy_kl_max"] > 1e-3  # a step lies between sampler and trainer


@pytest.mark.parametrize("drawn", [AHEAD, BOTH], ids=["whole", "partial"])
@pytest.mark.parametrize("die_in", ["update", "thread"])
def test_a_killed_run_ends_in_the_same_bits(
    die_in: str, drawn: RLConfig, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed in iteration 5, in its update or in the thread beside it; the batch that waits is that of iteration 5."""
    saved, real = tmp_path / "killed/checkpoints/step_4", NativeEngine.generate

    def die(iteration: int) -> None:
        if iteration == 5:
            runs.wait_for(saved)
            os._exit(9)

    def generate(self: NativeEngine, *args: Any, **more: Any) -> Any:
        if self.weight_version == 4 and threading.current_thread() is not threading.main_thread():
            runs.wait_for(saved)
            os._exit(9)
        return real(self, *args, **more)

    whole, killed = (config(tmp_path / name, base, rl=drawn) for name in ("whole", "killed"))
    assert go(whole, 2) == ["finished"] * 2
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        if die_in == "thread":
            patch.setattr(NativeEngine, "generate", generate)
        go(killed, 2, die if die_in == "update" else None)
    assert newest(tmp_path / "killed") == saved
    assert go(killed, 2) == ["finished"] * 2
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_sigterm_saves_the_batch_that_waits(base: str, tmp_path: Path):
    def terminate(iteration: int) -> None:
        if iteration == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    whole, stopped = (config(tmp_path / name, base, rl=AHEAD, save_every=5) for name in ("whole", "stopped"))
    assert go(whole) == ["finished"]
    assert go(stopped, hook=terminate) == ["exit 143"]
    assert (tmp_path / "stopped" / "preempted").read_text() == "step 3\n"
    assert go(stopped) == ["finished"]
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


LAYOUTS = {"2": {"zero": 1}, "2-zero3": {"zero": 3, "persist_below": 0}, "2-ep2-cp2": {"zero": 2, "ep": 2, "cp": 2}}


@pytest.fixture(scope="module")
def alone(base: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl.groups, "total_reward", lambda parts, rl: 1.0 - parts["length"])
        assert go(config(folder, base, rl=AHEAD, steps=3)) == ["finished"]
    return rows(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_takes_the_iterations_of_one_rank(layout: str, alone: list, base: str, tmp_path: Path):
    run = config(tmp_path / "run", base, rl=AHEAD, steps=3, parallel=ParallelConfig(**LAYOUTS[layout]))
    assert go(run, 2) == ["finished"] * 2
    for one, other in zip(alone, rows(tmp_path / "run"), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=1e-3, abs=1e-5), (one["step"], name)


def test_an_error_beside_the_update_ends_the_run_with_its_own_traceback(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = NativeEngine.generate

    def where_it_breaks(self: NativeEngine, *args: Any, **more: Any) -> Any:
        if self.weight_version == 1:
            raise ArithmeticError("no more luck")
        return real(self, *args, **more)

    monkeypatch.setattr(NativeEngine, "generate", where_it_breaks)
    with pytest.raises(AssertionError, match=r"(?s)where_it_breaks.*ArithmeticError: no more luck"):
        go(config(tmp_path / "run", base, rl=AHEAD))
    assert [row["step"] for row in rows(tmp_path / "run")] == [1]


def test_a_fault_of_the_update_ends_the_thread(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At its next token; nothing of it is left when the run has ended."""
    ended = tmp_path / "ended"

    def fail(iteration: int) -> None:
        raise ArithmeticError("in the update")

    class Short(Beside):
        def _check(self, *_: object) -> None:
            super()._check()
            time.sleep(0.2)

        def cancel(self) -> None:
            before = self._thread.is_alive()
            super().cancel()
            ended.write_text(f"{before} {self._thread.is_alive()} {type(self._fault).__name__}")

    monkeypatch.setattr(rl.rollouts, "Beside", Short)
    with pytest.raises(AssertionError, match="ArithmeticError: in the update"):
        go(config(tmp_path / "run", base, rl=AHEAD), hook=fail)
    assert ended.read_text() == "True False Cancelled"


def test_a_longer_run_goes_on_from_where_the_shorter_ended(base: str, tmp_path: Path):
    """Its last batch was nobody's: the next one is drawn by the weights as they stand."""
    short = config(tmp_path / "run", base, rl=AHEAD, steps=3)
    assert go(short) == ["finished"]
    assert go(replace(short, train=replace(short.train, steps=5))) == ["finished"]
    assert [row["rollout/staleness_mean"] for row in rows(tmp_path / "run")] == [0, 1, 1, 0, 1]
    rates = [row.get("rollout/tokens_per_s") for row in runs.rows(tmp_path / "run")]
    assert (
        rates[4] is None and all(0 < rate < 1e6 for rate in rates[:4] if rate) and all(rates[:2])
    )  # 3, 5: drew nothing


def test_the_cache_of_autocast_outlives_the_thread():
    """A weight that is cast once an update gets one sum of its gradients; a thread that leaves autocast would drop the
    cast."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    other, x = torch.ones(2, 2), torch.ones(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        first = torch.mm(x, weight)

        def work(check: Callable[..., None]) -> torch.Tensor:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                return torch.mm(x, other)

        beside = Beside(work, torch.device("cpu"))
        assert torch.equal(beside.result(), torch.full((1, 2), 2, dtype=torch.bfloat16))
        second = torch.mm(x, weight)
    casts = {id_of for out in (first, second) for id_of in [out.grad_fn.next_functions[1][0]]}
    assert len(casts) == 1
