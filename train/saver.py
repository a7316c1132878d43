"""Saves beside the training: a step waits for the copy of this rank's state alone, a thread on every rank writes it.

    main thread   wait for the save before | copy (checkpoint.take) | train on                       | raise what failed
    thread                                                          | prepare | write, sync | commit |

The threads agree after each of their three steps over a process group of their own (gloo, also where training has
NCCL). Only they use it, and there is one save at a time, so on every rank it sees the same calls in the same order:
they cannot meet a collective of the training. A checkpoint is there as soon as the slowest rank has written its file.

A save fails on all ranks alike, but each learns of it from its own thread, at a moment of its own. So `failed` only
asks for a stop, by the way that SIGTERM goes (`RunContext.stop_asked`, summed over the ranks in the step), and all of
them raise the reason after the same step, where they next wait for the save.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from train import checkpoint, distributed
from train.checkpoint import Taken, TrainState
from train.engine_base import EngineBase

CLOSE_S = 60.0  # that a save in flight still gets where the run ends with a fault


class Saver:
    """The checkpoints of one run, on this rank. All ranks make it, and call `save` and `wait` alike."""

    def __init__(self, run: Path, keep: int, background: bool) -> None:
        """`background` False writes within `save`."""
        self.run, self.keep, self.background = run, keep, background
        self._group = distributed.side_group()
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None
        self._step = -1  # of the last save

    @property
    def failed(self) -> bool:
        """Whether the save in flight is known to have failed; the next `wait` raises why."""
        return self._fault is not None

    def save(self, engine: EngineBase, state: TrainState, held: Mapping[str, Tensor] | None = None) -> None:
        """Writes `run/checkpoints/step_N`, once for each step; first waits for the save before and raises what `wait`
        raises. `held`: see `checkpoint.take`."""
        self.wait()
        if state.step == self._step:
            return
        taken, self._step = checkpoint.take(engine, state, held), state.step
        if self.background:
            # a daemon: one that is stuck must not keep the process from ending
            self._thread = threading.Thread(target=self._write, args=(taken,), name="saver", daemon=True)
            self._thread.start()
        else:
            self._write(taken)
            self.wait()

    def _write(self, taken: Taken) -> None:
        try:
            checkpoint.write(taken, self.run, self.keep, self._group)
        except BaseException as fault:  # the thread's boundary: `wait` raises it in the main thread
            self._fault = fault

    def wait(self) -> None:
        """Until the save in flight is whole. Raises what hindered it, a UserError on all ranks alike."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def close(self) -> str | None:
        """For a run that ends with a fault: gives the save in flight CLOSE_S to become whole -> why it did not."""
        if self._thread is not None:
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                return f"the checkpoint of step {self._step} was not written within {CLOSE_S:.0f} s and is given up"
        return None if self._fault is None else str(self._fault)
