"""One stage as a process of its own: the launcher it needs, its threads, and signals that reach it.

Used by what strings stages together (launch/pipeline.py, the demos). The stage's own contract does the rest: a finished
run exits 0 at once, a stopped one goes on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

STAGE = Path(__file__).resolve().parent / "stage.py"


@dataclass(frozen=True)
class Ended:
    """How a stage ended: its exit status and the seconds that it took."""

    status: int
    seconds: float


class Runner:
    """Runs one process at a time. As a context manager it hands SIGTERM, Ctrl-C and a lost terminal on to it and waits
    for its save; `stopped` is then the exit status that the caller shall end with, and no other stage starts."""

    def __init__(self, launch: Sequence[str] = ()) -> None:
        """`launch`: what starts a stage on all its ranks, in place of torchrun on this machine."""
        self.stopped: int | None = None
        self._launch = list(launch)
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Runner:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = 128 + number
        if self._child is not None:  # Ctrl-C too: SIGINT would end it without a save
            self._child.send_signal(signal.SIGTERM)

    def run(
        self, arguments: Sequence[str], ranks: int = 1, more: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> Ended:
        """launch/stage.py with `arguments` on `ranks` processes. `more`: environment beside this process's; `cwd`: what
        relative paths are relative to, if not to this process's."""
        if self.stopped is not None:
            return Ended(self.stopped, 0.0)
        start = time.monotonic()
        command = [*(self._launch or [sys.executable, *launcher(ranks), str(STAGE)]), *arguments]
        # torchrun would set 1 thread and say so at length; elsewhere the launcher knows its cores
        threads = {} if self._launch else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
        environment = {**threads, **os.environ, **(more or {})}
        # a session of its own: Ctrl-C in a terminal reaches it through `_stop` alone, as SIGTERM
        with subprocess.Popen(command, env=environment, cwd=cwd, start_new_session=True) as child:
            self._child = child
            if self.stopped is not None:  # it came between the check above and now
                child.send_signal(signal.SIGTERM)
            status = child.wait()
            self._child = None
        return Ended(status if status >= 0 else 128 - status, time.monotonic() - start)


def launcher(ranks: int) -> list[str]:
    """What stands between Python and the script: torchrun for more than one process."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
