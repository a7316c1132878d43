"""Groups in work beside the trainer: each is asked for by a thread of its own, which waits for servers and does nothing
else. At most `at_once` of them are; of those that wait for a thread the one with the lowest number is next.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Sequence

from rl.messages import RolloutRequest, Sample
from rl.rollout.beside import CLOSE_S, Cancelled

Ask = Callable[[Sequence[RolloutRequest], Callable[..., None]], list[Sample]]


class Asking:
    """`ask`: the samples of a group; it is handed a function to call now and then, which ends it when the run does."""

    def __init__(self, ask: Ask, at_once: int) -> None:
        self._ask, self.at_once = ask, at_once
        self._changed = threading.Condition()
        self._queue: list[int] = []  # a heap
        self._asked: dict[int, Sequence[RolloutRequest]] = {}  # queued or in work
        self._came: dict[int, list[Sample]] = {}
        self._news = self._closed = False
        self._threads: list[threading.Thread] = []
        self.fault: BaseException | None = None  # the first of a thread

    def start(self, number: int, requests: Sequence[RolloutRequest]) -> None:
        with self._changed:
            self._asked[number] = requests
            heapq.heappush(self._queue, number)
            if len(self._threads) < self.at_once:  # daemons: one that is stuck must not keep the process from ending
                self._threads.append(threading.Thread(target=self._run, name=f"group {number}", daemon=True))
                self._threads[-1].start()
            self._changed.notify_all()

    def put(self, number: int, samples: list[Sample]) -> None:
        """A group that came before, in another process."""
        self._came[number] = samples

    def wait(self, seconds: float) -> None:
        """Until a group has come since the last call, or a thread has failed; `seconds` at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._news or self.fault is not None, seconds)
            self._news = False

    def state(self) -> tuple[dict[int, list[Sample]], dict[int, Sequence[RolloutRequest]]]:
        """-> (groups that came and were not taken, those that are asked for), by number."""
        with self._changed:
            return dict(self._came), dict(self._asked)

    def take(self, number: int) -> list[Sample]:
        with self._changed:
            return self._came.pop(number)

    def close(self) -> None:
        """Ends what is in work; waits for it, for CLOSE_S at most."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        deadline = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _check(self, *_: object) -> None:
        if self._closed:
            raise Cancelled

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._queue or self._closed)
                    if self._closed:
                        return
                    number = heapq.heappop(self._queue)
                    requests = self._asked[number]
                samples = self._ask(requests, self._check)
                with self._changed:
                    del self._asked[number]
                    self._came[number], self._news = samples, True
                    self._changed.notify_all()
        except BaseException as fault:  # the thread's boundary: the main thread raises it
            with self._changed:
                self.fault = self.fault or fault
                self._changed.notify_all()
