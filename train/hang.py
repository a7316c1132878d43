"""The watchdog: a job that makes no progress for `train.hang_limit_s` seconds ends with one reason and all stacks.

A rank that hangs leaves the others waiting inside a collective, where no exception reaches them. So a thread on every
rank looks at the time since the last step; the first to find it too long writes `hung` into `DIR/stacks`, every rank
that sees that file writes the stacks of its threads beside it, and all end with status 1. The launcher then starts the
ranks again if it may (`torchrun --max-restarts`).
"""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
import time
from pathlib import Path

STATUS = 1
GRACE_S = 2.0  # for the other ranks to see the file and write their stacks


class Watchdog:
    """`beat` at every step, `rest` where no step is expected; `limit_s` 0 switches it off. A context manager.

    It rests until the first step is done: what comes before takes as long as it takes (tokenising, compiling)."""

    def __init__(self, folder: Path, rank: int, limit_s: float) -> None:
        self.folder, self.rank, self.limit_s = folder, rank, limit_s
        self.stacks = folder / "stacks"
        self._last, self._what = math.inf, "the start"
        self._started = time.time()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, what: str) -> None:
        """Progress was made; `what` stands in the reason if it was the last."""
        self._last, self._what = time.monotonic(), what

    def rest(self) -> None:
        """No progress is expected until the next beat."""
        self._last = math.inf

    def __enter__(self) -> Watchdog:
        if self.limit_s > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        pause = min(1.0, self.limit_s / 20)
        while not self._done.wait(pause):
            waited = time.monotonic() - self._last
            if waited > self.limit_s:
                self._end(
                    f"rank {self.rank} made no progress for {waited:.0f} s after {self._what}"
                    f" (train.hang_limit_s={self.limit_s:g}): the stacks of all ranks are in {self.stacks}"
                )
            elif self._others_hang():
                self._end((self.stacks / "hung").read_text(encoding="utf-8").strip())

    def _others_hang(self) -> bool:
        try:
            return (self.stacks / "hung").stat().st_mtime >= self._started
        except FileNotFoundError:
            return False

    def _end(self, reason: str) -> None:
        self.stacks.mkdir(parents=True, exist_ok=True)
        with open(self.stacks / f"rank_{self.rank:05d}.txt", "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        if not self._others_hang():
            for path in (self.stacks / "hung", self.folder / "error.txt"):
                partial = path.with_name(f".{path.name}.{self.rank}")
                partial.write_text(reason + "\n", encoding="utf-8")
                partial.replace(path)
        time.sleep(GRACE_S)
        if self.rank == 0:
            print(reason, file=sys.stderr, flush=True)
        os._exit(STATUS)  # the main thread is inside a collective and cannot be asked
