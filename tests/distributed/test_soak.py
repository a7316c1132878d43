"""A run of two ranks that loses a random rank twenty times, at random moments, ends in the bits of a quiet one."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.train import runs
from train.checkpoint import newest, read_state

KILLS, STEPS = 20, 70


def kill_soon(step: int, rank: int, delay: float) -> runs.Hook:
    """SIGKILL to `rank`, `delay` seconds after it asked for its first sequence of `step` (2 ranks x 2 sequences)."""

    def hook(asked: int) -> None:
        if asked == 4 * step + 2 * rank and dist.get_rank() == rank:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    return hook


def test_twenty_kills_leave_the_same_bits(tmp_path: Path) -> None:
    draw = random.Random(7)
    settings = {"steps": STEPS, "save_every": 2, "zero": 2}
    assert runs.go(runs.config(tmp_path / "whole", **settings), 2) == ["finished"] * 2
    reached = []
    for _ in range(KILLS):
        last = newest(tmp_path / "killed")
        done = 0 if last is None else read_state(last).step
        hook = kill_soon(done + draw.randint(0, 4), draw.randint(0, 1), draw.uniform(0.0, 0.1))
        with pytest.raises(AssertionError, match="died|failed"):
            runs.go(runs.config(tmp_path / "killed", **settings), 2, hook)
        reached.append(done)
    assert len(set(reached)) > 5, reached  # it went on in between
    assert runs.go(runs.config(tmp_path / "killed", **settings), 2) == ["finished"] * 2
    runs.assert_same_run(tmp_path / "whole", tmp_path / "killed")
