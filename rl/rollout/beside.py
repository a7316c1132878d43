"""A call in a thread beside the main one: rollouts that run while the trainer updates its weights.

The thread may touch nothing that the main one changes, so that its result is the same whenever it runs. Of torch's
state per process one thing is shared: the casts that autocast keeps for its weights, which a thread that leaves its
outermost autocast throws away for all. The trainer's gradients would then be summed in other dtypes, by chance; so the
thread never leaves its outermost one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
CLOSE_S = 60.0  # that a call still gets to end after it was asked to


class Cancelled(Exception):
    """The main thread does not want the result any more."""


class Beside(Generic[T]):
    """Starts `work` at once. `work` is handed a function to call now and then, which ends it where it is not wanted any
    more."""

    def __init__(self, work: Callable[[Callable[..., None]], T], device: torch.device) -> None:
        self._work, self._device = work, device
        self._found: list[T] = []
        self._fault: BaseException | None = None
        self._cancelled = False
        self._stream = None
        if device.type == "cuda":  # a stream of its own, behind what the main one has launched so far
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
        # a daemon: one that is stuck must not keep the process from ending
        self._thread = threading.Thread(target=self._run, name="beside", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            torch.autocast_increment_nesting()
            with self._on_stream():
                self._found.append(self._work(self._check))
            if self._stream is not None:
                self._stream.synchronize()
        except BaseException as fault:  # the thread's boundary: `result` raises it in the main thread
            self._fault = fault

    def _on_stream(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        torch.cuda.set_device(self._device)  # of each thread
        return torch.cuda.stream(self._stream)

    def _check(self, *_: object) -> None:
        if self._cancelled:
            raise Cancelled

    def result(self) -> T:
        """Waits for it. Raises what it raised, with the thread's traceback."""
        self._thread.join()
        if self._fault is not None:
            raise self._fault
        return self._found[0]

    def cancel(self) -> None:
        """Waits until it has ended, for CLOSE_S at most; the result and its faults are gone."""
        self._cancelled = True
        self._thread.join(CLOSE_S)
