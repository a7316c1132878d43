"""Whole runs cut in depth: their metrics, checkpoints and export are those of one process, also across a kill and under
another layout afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from conf.schema import OptimConfig, ParallelConfig
from tests.train import runs
from train.checkpoint import newest

MODEL = replace(runs.MODEL, num_hidden_layers=4)
LAYOUTS = {  # name -> (processes, ParallelConfig, micro-batches of four sequences a step)
    "1": (1, ParallelConfig(), 4),
    "1f1b": (2, ParallelConfig(pp=2), 4),
    "1f1b-ep2-cp2": (4, ParallelConfig(ep=2, cp=2, pp=2), 4),
    "1f1b-dp2": (4, ParallelConfig(pp=2), 2),
    "zbv-ep2": (4, ParallelConfig(ep=2, pp=2, pp_schedule="zbv"), 2),
    "2-ep2": (2, ParallelConfig(ep=2), 2),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pretraining run that the other stages start from, on one process."""
    folder = tmp_path_factory.mktemp("base") / "run"
    assert runs.go(run(folder, "pretrain", "1", None)[0]) == ["finished"]
    return folder


@pytest.fixture(scope="module")
def alone(base: Path) -> Callable[[str], Path]:
    """Stage -> the folder of its run on one process."""

    @cache
    def made(stage: str) -> Path:
        folder = base.parent / stage
        assert runs.go(*run(folder, stage, "1", None if stage == "pretrain" else base)) == ["finished"]
        return folder

    return made


def run(folder: Path, stage: str, layout: str, init_from: Path | None) -> tuple[runs.RunConfig, int]:
    world, parallel, micro_batches = LAYOUTS[layout]
    start = None if init_from is None else str(init_from)
    fields = {"parallel": parallel, "micro_batches": micro_batches, "model": MODEL, "init_from": start}
    # eps above the rounding of tiny gradients, which AdamW would otherwise blow up to whole steps
    return runs.config(folder, stage, optim=OptimConfig(warmup_steps=2, eps=1e-4), **fields), world


def assert_close(one: Path, other: Path, start: Path | None) -> None:
    """The same rows of the same metrics, and weights that moved alike."""
    mine, theirs = runs.rows(one), runs.rows(other)
    assert [row["step"] for row in mine] == [1, 2, 3, 4, 5, 6]
    for row, wanted in zip(mine, theirs, strict=True):
        assert row.keys() == wanted.keys()
        for key, value in wanted.items():
            assert row[key] == pytest.approx(value, rel=2e-4, abs=1e-6), (row["step"], key)
    ends = runs.weights(one), runs.weights(other)
    assert ends[0].keys() == ends[1].keys()
    begun = ends[1] if start is None else runs.weights(start)
    for name, value in ends[1].items():
        moved = max(float((value - begun[name]).norm()), 1e-4 * float(value.norm()))
        assert float((ends[0][name] - value).norm()) <= 1e-3 * moved, name


CASES = [("pretrain", "1f1b-dp2"), ("dense_warmup", "1f1b-ep2-cp2"), ("sparse_adapt", "1f1b-ep2-cp2")]
CASES += [("sparse_adapt", "zbv-ep2"), ("sft", "1f1b")]


@pytest.mark.parametrize(("stage", "layout"), CASES)
def test_a_run_in_depth_is_the_run_of_one_process(
    stage: str, layout: str, base: Path, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    start = None if stage == "pretrain" else base
    config, world = run(tmp_path / "deep", stage, layout, start)
    assert runs.go(config, world) == ["finished"] * world
    assert_close(tmp_path / "deep", alone(stage), start)


def in_step_5(saved: Path) -> runs.Hook:
    return runs.die_at(4 * 4 + 1, saved)


@pytest.mark.parametrize(("stage", "layout"), [("dense_warmup", "1f1b"), ("sparse_adapt", "zbv-ep2")])
def test_killed_run_ends_in_the_same_bits(stage: str, layout: str, base: Path, tmp_path: Path) -> None:
    config, world = run(tmp_path / "whole", stage, layout, base)
    assert runs.go(config, world) == ["finished"] * world
    killed, _ = run(tmp_path / "killed", stage, layout, base)
    saved = tmp_path / "killed/checkpoints/step_4"
    with pytest.raises(AssertionError):
        runs.go(killed, world, in_step_5(saved))
    assert newest(tmp_path / "killed") == saved
    assert runs.go(killed, world) == ["finished"] * world
    runs.assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(
    ("stage", "first", "then"),
    [
        ("dense_warmup", "1f1b-ep2-cp2", "1"),
        ("sparse_adapt", "2-ep2", "zbv-ep2"),
        ("sparse_adapt", "zbv-ep2", "1f1b"),
    ],
)
def test_a_run_goes_on_in_another_depth(
    stage: str, first: str, then: str, base: Path, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    config, world = run(tmp_path / "changed", stage, first, base)
    saved = tmp_path / "changed/checkpoints/step_4"
    with pytest.raises(AssertionError):
        runs.go(config, world, in_step_5(saved))
    assert newest(tmp_path / "changed") == saved
    config, world = run(tmp_path / "changed", stage, then, base)
    assert runs.go(config, world) == ["finished"] * world
    assert_close(tmp_path / "changed", alone(stage), base)
