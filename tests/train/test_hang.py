"""A rank that hangs ends the whole job, with the reason and the stacks of every rank on the disk."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.distributed.helper import run_ranks
from train.hang import Watchdog


def sleep_in_the_reward() -> None:
    time.sleep(60)


def work(folder: Path, limit_s: float, hangs: bool, pause: float = 0.3) -> str:
    rank = dist.get_rank()
    with Watchdog(folder, rank, limit_s) as watchdog:
        for step in range(4):
            watchdog.beat(f"step {step}")
            if hangs and rank == 1 and step == 2:
                sleep_in_the_reward()
            time.sleep(pause)
            dist.barrier()
    return "finished"


def test_a_hanging_rank_ends_the_job_and_all_stacks_are_kept(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match="exit status of those that died: .*1"):
        run_ranks(work, 2, tmp_path, 1.0, True)
    assert time.monotonic() - start < 10
    time.sleep(0.5)
    stacks = {rank: (tmp_path / f"stacks/rank_{rank:05d}.txt").read_text() for rank in (0, 1)}
    assert "sleep_in_the_reward" in stacks[1] and "barrier" in stacks[0]
    reason = (tmp_path / "error.txt").read_text()
    assert reason.count("\n") == 1 and "made no progress for 1 s after step 2 (train.hang_limit_s=1)" in reason
    assert reason == (tmp_path / "stacks/hung").read_text()


def test_a_job_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks/hung").write_text("of an earlier attempt\n")
    time.sleep(0.05)
    assert run_ranks(work, 2, tmp_path, 1.0, False) == ["finished"] * 2
    assert not (tmp_path / "error.txt").exists()


def test_limit_zero_switches_it_off(tmp_path: Path) -> None:
    assert run_ranks(work, 1, tmp_path, 0.0, False, 0.02) == ["finished"]
