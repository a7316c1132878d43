"""A disk that is full, met for real: the kernel refuses the bytes, at any of them.

Two ways work in every container, without privileges: a file that is `/dev/full` (ENOSPC; every OCI runtime puts it
there), and RLIMIT_FSIZE, which stops a file at a byte of our choice (EFBIG; Python ignores the signal that comes with
it). A small tmpfs behind the real entry is in tests/launch/test_disk.py.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from conf.schema import OptimConfig, ParallelConfig
from tests.distributed.helper import run_ranks
from tests.train import runs, tiny
from train import checkpoint, shards
from train.checkpoint import TrainState, newest, read_state
from train.engine import Engine
from train.optim import build_optimizer


def limit_files(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def dev_full(folder: Path) -> None:
    (folder / "rank_00001.safetensors").symlink_to("/dev/full")


FULL: dict[str, tuple[Callable[[Path], None], str]] = {
    "no room": (dev_full, "No space left on device"),
    "no more bytes": (lambda _: limit_files(100_000), "File too large"),
}


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("kind", FULL)
def test_a_full_disk_leaves_the_earlier_checkpoint_and_says_so(
    kind: str, background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill, reason = FULL[kind]
    real = shards.write

    def write(folder: Path, rank: int, tensors: dict) -> object:
        if rank == 1 and folder.name == ".tmp_step_4":
            fill(folder)
        return real(folder, rank, tensors)

    run = runs.config(tmp_path / "run", async_save=background)
    assert runs.go(runs.config(tmp_path / "whole"), 2) == ["finished"] * 2
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write", write)
        words = rf"(?m)UserError: the checkpoint could not be written: {reason} \(.*step_2 is whole: make room and .*$"
        with pytest.raises(AssertionError, match=words):
            runs.go(run, 2)
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["latest", "step_2"]
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_2\n"
    assert runs.go(run, 2) == ["finished"] * 2
    runs.assert_same_run(tmp_path / "whole", tmp_path / "run")


def save(engine: Engine, run: Path, step: int, limit: int | None = None) -> str:
    """Writes the step with files of at most `limit` bytes -> "written", or why not."""
    taken = checkpoint.take(engine, TrainState(step=step))
    if limit is not None:
        limit_files(limit)
    try:
        checkpoint.write(taken, run, keep=3)
    except UserError as error:
        return str(error)
    finally:
        limit_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    return "written"


def make_engine() -> Engine:
    net, optim = tiny.build(), OptimConfig(lr=1e-3)
    return Engine(net, build_optimizer(net, optim), optim, ParallelConfig(zero=1))


def fill_at_any_byte(run: Path) -> None:
    engine, checkpoints = make_engine(), run / "checkpoints"
    assert save(engine, run, 1) == "written"
    first = read_state(checkpoints / "step_1")
    size = first.files[0]["num_bytes"]
    for limit in (0, 1, 8, 9, 500, size // 3, size // 2, size - 4096, size - 1):
        assert "could not be written: File too large" in save(engine, run, 2, limit), limit
        assert sorted(os.listdir(checkpoints)) == ["latest", "step_1"], limit
        checkpoint.open_shards(checkpoints / "step_1", first)  # compares the checksums
    assert save(engine, run, 2, size) == "written"
    checkpoint.restore(engine, newest(run) or run)


def test_a_disk_full_at_any_byte_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    run_ranks(fill_at_any_byte, 1, tmp_path)
    assert newest(tmp_path) == tmp_path / "checkpoints/step_2"


def fill_before(name: str, run: Path) -> str:
    """Saves two steps, the second with no room from the call of `checkpoint.NAME` on."""
    real = getattr(checkpoint, name)
    engine = make_engine()
    assert save(engine, run, 1) == "written"

    def full(*args: Any) -> Any:
        limit_files(3)
        return real(*args)

    setattr(checkpoint, name, full)  # this process alone
    return save(engine, run, 2)


def test_no_room_for_the_state_or_for_latest(tmp_path: Path) -> None:
    (told,) = run_ranks(fill_before, 1, "asdict", tmp_path / "state")  # called for state.json
    assert "File too large" in told and "step_1 is whole" in told
    assert sorted(os.listdir(tmp_path / "state/checkpoints")) == ["latest", "step_1"]
    (told,) = run_ranks(fill_before, 1, "_point_latest", tmp_path / "latest")
    assert "File too large" in told and "step_2 is whole" in told
    assert newest(tmp_path / "latest") == tmp_path / "latest/checkpoints/step_2"
    assert (tmp_path / "latest/checkpoints/latest").read_text() == "step_1\n"
