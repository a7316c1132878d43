"""Saves beside the training: killed at every stage, slow, failing, and with a fault elsewhere.

The runs are forked, so what a test puts into `train.checkpoint` holds in their processes, on all ranks.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import train.saver
from conf.errors import UserError
from tests.distributed.helper import run_ranks
from tests.train import runs
from train import checkpoint, shards
from train.checkpoint import newest, read_state, step_folders


def outcome(run: runs.RunConfig, hook: runs.Hook | None = None) -> str:
    """How a run ended on this rank, its error included."""
    try:
        return runs._run(run, hook, frozenset())
    except (UserError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module", params=[1, 2])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """(number of ranks, an uninterrupted run of them)."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert runs.go(runs.config(folder), request.param) == ["finished"] * request.param
    return request.param, folder


def die(real: Callable[..., Any], where: Callable[..., bool], before: bool = True) -> Callable[..., Any]:
    """`real`, with the end of the process before or after the call that `where` says."""

    def dying(*args: Any, **kwargs: Any) -> Any:
        if where(*args):
            if not before:
                real(*args, **kwargs)
            os._exit(9)
        return real(*args, **kwargs)

    return dying


def is_last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def cut_blocks(real: Callable[..., Any]) -> Callable[..., Any]:
    """The last rank dies with half of its second file on the disk."""
    files = []

    def blocks(tensors: dict) -> Any:
        files.append(0)
        every = list(real(tensors))
        for number, block in enumerate(every):
            if len(files) == 2 and is_last() and number == len(every) // 2:
                os._exit(9)
            yield block

    return blocks


MOMENTS = {  # moment -> (module, function, its replacement, steps of the whole checkpoints that the kill leaves)
    "copying": (checkpoint, "take", lambda real: die(real, lambda _, state, held: state.step == 4 and is_last()), [2]),
    "before the folder": (shards, "write", lambda real: die(real, lambda at, *_: _is_4(at) and is_last()), [2]),
    "in the file": (shards, "_blocks", cut_blocks, [2]),
    "after the file": (shards, "write", lambda real: die(real, lambda at, *_: _is_4(at) and is_last(), False), [2]),
    "before the sync": (checkpoint, "_sync_tree", lambda real: die(real, lambda at: _is_4(at)), [2]),
    "after the sync": (checkpoint, "_sync_tree", lambda real: die(real, lambda at: _is_4(at), False), [2]),
    "before latest": (checkpoint, "_point_latest", lambda real: die(real, lambda _, name: name == "step_4"), [2, 4]),
    "after latest": (
        *(checkpoint, "_point_latest"),
        *(lambda real: die(real, lambda _, name: name == "step_4", False), [2, 4]),
    ),
    "before removing": (checkpoint, "_remove", lambda real: die(real, lambda at: at.name == "step_2"), [2, 4, 6]),
    "while removing": (
        *(checkpoint.shutil, "rmtree"),
        *(lambda real: die(real, lambda at, *_: Path(at).name == ".tmp_step_2" and step_folder_6(at)), [4, 6]),
    ),
}


def _is_4(folder: Path) -> bool:
    return folder.name == ".tmp_step_4"


def step_folder_6(at: Path) -> bool:
    return (Path(at).parent / "step_6").exists()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_any_stage_leaves_whole_checkpoints_and_the_same_bits(
    moment: str, whole: tuple[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, uninterrupted = whole
    module, name, replacement, left = MOMENTS[moment]
    run = runs.config(tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(shards, "BLOCK", 1 << 12)  # many blocks a file
        patch.setattr(module, name, replacement(getattr(module, name)))
        with pytest.raises(AssertionError, match="died|failed"):
            runs.go(run, world)
    checkpoints = tmp_path / "killed/checkpoints"
    assert list(step_folders(checkpoints)) == left
    assert all((folder / each["name"]).is_file() for folder in step_folders(checkpoints).values()
               for each in read_state(folder).files)  # fmt: skip
    assert runs.go(run, world) == ["finished"] * world
    runs.assert_same_run(uninterrupted, tmp_path / "killed")
    if left[-1] < 6:  # else there was nothing more to save
        assert sorted(os.listdir(checkpoints)) == ["latest", "step_4", "step_6"]
        assert (checkpoints / "latest").read_text() == "step_6\n"


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("world", [1, 2])
def test_steps_go_on_beside_a_slow_write_of_the_state_at_the_step(
    world: int, background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While step 3 is being written, step 4 is taken and step 5 begins; the file holds step 3 all the same."""
    real, asked = shards.write, []

    def hook(index: int) -> None:
        asked.append(index)
        torch.manual_seed(index)  # random states too are those of the step

    def write(folder: Path, rank: int, tensors: dict) -> object:
        if folder.name == ".tmp_step_3":
            deadline = time.monotonic() + (60 if background else 0.5)
            while len(asked) < 10 and time.monotonic() < deadline:  # two sequences a step on each rank
                time.sleep(0.002)
            (tmp_path / f"asked_{rank}").write_text(str(len(asked)))
        return real(folder, rank, tensors)

    plain, slow = (runs.config(tmp_path / name, save_every=3, async_save=background) for name in ("plain", "slow"))
    assert runs.go(plain, world, hook) == ["finished"] * world
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write", write)
        assert runs.go(slow, world, hook) == ["finished"] * world
    found = [int((tmp_path / f"asked_{rank}").read_text()) for rank in range(world)]
    assert min(found) >= 10 if background else found == [6] * world
    runs.assert_same_run(tmp_path / "plain", tmp_path / "slow")
    one, other = (tmp_path / name / "checkpoints/step_3" for name in ("plain", "slow"))
    runs.assert_same_checkpoint(one, other, but=".python")  # no two processes have the same


def test_two_saves_never_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint.write

    def write(taken: checkpoint.Taken, *args: Any) -> None:
        with open(tmp_path / f"rank_{dist.get_rank()}", "a") as log:
            print("begins", taken.state.step, file=log, flush=True)
            time.sleep(0.1)
            real(taken, *args)
            print("ends", taken.state.step, file=log, flush=True)

    monkeypatch.setattr(checkpoint, "write", write)
    assert runs.go(runs.config(tmp_path / "run", save_every=1, steps=5), 2) == ["finished"] * 2
    in_order = [line for step in range(1, 6) for line in (f"begins {step}", f"ends {step}")]
    assert [(tmp_path / f"rank_{rank}").read_text().splitlines() for rank in (0, 1)] == [in_order] * 2


def fail(error: Callable[[Path], Exception], step: int) -> Callable[..., object]:
    """`shards.write` that raises on rank 1 at `step`."""
    real = shards.write

    def write(folder: Path, rank: int, tensors: dict) -> object:
        if rank == 1 and folder.name == f".tmp_step_{step}":
            raise error(folder)
        return real(folder, rank, tensors)

    return write


def disk_full(folder: Path) -> OSError:
    return OSError(28, "No space left on device", str(folder / "rank_00001.safetensors"))


@pytest.mark.parametrize("background", [True, False])
def test_a_failed_save_ends_all_ranks_with_the_same_line_at_the_next_step(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "write", fail(disk_full, 60))
    run = runs.config(tmp_path / "run", save_every=30, steps=120, async_save=background)
    one, other = run_ranks(outcome, 2, run)
    assert one == other and "\n" not in one
    assert one.startswith("UserError: the checkpoint could not be written: No space left on device (")
    assert one.endswith("step_30 is whole: make room and start again")
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["latest", "step_30"]
    last = runs.rows(tmp_path / "run")[-1]["step"]
    assert last < 90 if background else last == 60  # not as late as the next save


@pytest.mark.parametrize("asked", ["the last step", "SIGTERM"])
def test_finish_and_preemption_wait_for_the_save_and_tell_its_failure(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hook(index: int) -> None:
        if index == 10 and asked == "SIGTERM":  # rank 1's, in step 3
            os.kill(os.getpid(), signal.SIGTERM)

    step = 3 if asked == "SIGTERM" else 6
    monkeypatch.setattr(shards, "write", fail(disk_full, step))
    one, other = run_ranks(outcome, 2, runs.config(tmp_path / "run", save_every=6), hook)
    assert one == other and "No space left on device" in one
    assert os.listdir(tmp_path / "run/checkpoints") == []
    assert not (tmp_path / "run/hf").exists() and not (tmp_path / "run/preempted").exists()


def test_a_bug_in_the_thread_of_one_rank_leaves_none_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "write", fail(lambda _: RuntimeError("a bug"), 2))
    one, other = run_ranks(outcome, 2, runs.config(tmp_path / "run", steps=1000))
    assert other == "RuntimeError: a bug"
    assert one.startswith("RuntimeError: ") and one != other  # the connection was closed
    assert newest(tmp_path / "run") is None


def slow_write(seconds: float) -> Callable[..., object]:
    real = shards.write

    def write(folder: Path, rank: int, tensors: dict) -> object:
        time.sleep(seconds)
        return real(folder, rank, tensors)

    return write


def test_a_fault_elsewhere_lets_the_save_in_flight_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hook(index: int) -> None:
        if index == 8:  # the first of step 5
            raise RuntimeError("elsewhere")

    monkeypatch.setattr(shards, "write", slow_write(0.5))
    assert run_ranks(outcome, 1, runs.config(tmp_path / "run"), hook) == ["RuntimeError: elsewhere"]
    assert newest(tmp_path / "run") == tmp_path / "run/checkpoints/step_4"


def test_a_fault_elsewhere_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def hook(index: int) -> None:
        if index == 8:
            raise RuntimeError("elsewhere")

    monkeypatch.setattr(shards, "write", slow_write(600))
    monkeypatch.setattr(train.saver, "CLOSE_S", 0.2)
    start = time.monotonic()
    assert run_ranks(outcome, 1, runs.config(tmp_path / "run", save_every=4), hook) == ["RuntimeError: elsewhere"]
    assert time.monotonic() - start < 30
    assert newest(tmp_path / "run") is None
    assert "the checkpoint of step 4 was not written within 0 s and is given up" in capfd.readouterr().out


@pytest.mark.parametrize("asked", ["the last step", "SIGTERM"])
def test_a_save_longer_than_the_watchdogs_limit_is_no_hang(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hook(index: int) -> None:
        if index == 6 and asked == "SIGTERM":  # rank 1's, in step 2
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(shards, "write", slow_write(4.0))
    steps, save_every, end, whole = (9, 9, "exit 143", [2]) if asked == "SIGTERM" else (2, 1, "finished", [1, 2])
    run = runs.config(tmp_path / "run", steps=steps, save_every=save_every, hang_limit_s=3.0)
    assert runs.go(run, 2, hook) == [end] * 2
    assert list(step_folders(tmp_path / "run/checkpoints")) == whole
    assert not (tmp_path / "run/stacks").exists()
