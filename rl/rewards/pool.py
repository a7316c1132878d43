"""Grades attempts in processes that can be killed: model output is hostile, and a symbolic comparison may never end.

A worker is an interpreter of its own (no fork of the trainer, no import of its main module) in its own process group.
A grade past its deadline gets the whole group killed and a new worker started; a grader that raises, dies or returns
no finite number is a failure too. A failure is reported as such and never as reward 0: the loop drops the group and
counts it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rl.rewards.attempt import Attempt

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120.0  # imports of a fresh worker on a busy machine


@dataclass(frozen=True)
class Grade:
    """Raw parts by name, or None and why there are none."""

    parts: dict[str, float] | None
    error: str | None = None


class _Worker:
    """One child process: starting until it says so, then idle or busy with one attempt."""

    def __init__(self, registry: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rl.rewards.worker", registry],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.received = b""
        self.started = False
        self.job: int | None = None  # index of the attempt in hand
        self.deadline = time.monotonic() + START_TIMEOUT_S

    @property
    def awaited(self) -> bool:
        return not self.started or self.job is not None

    def send(self, index: int, message: dict[str, Any], timeout_s: float) -> None:
        self.stdin.write(json.dumps(message).encode() + b"\n")
        self.stdin.flush()
        self.job, self.deadline = index, time.monotonic() + timeout_s

    def receive(self) -> dict[str, Any] | None:
        """A whole answer, or None while one is still coming. Raises EOFError where the process has ended."""
        data = os.read(self.stdout.fileno(), 1 << 16)
        if not data:
            raise EOFError
        self.received += data
        if not self.received.endswith(b"\n"):
            return None
        answer, self.received = json.loads(self.received), b""
        return answer

    def kill(self) -> None:
        """Ends the worker and whatever its grader started."""
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # an attempt that a dead worker never read
            self.stdin.close()


class RewardPool:
    """`workers` processes that serve `grade`; a context manager.

    timeout_s: seconds a grade may take; registry: `module:NAME` of a dict name -> grader, imported by the workers.
    """

    def __init__(self, workers: int, timeout_s: float, registry: str = "rl.rewards.rules:REWARDS") -> None:
        self.timeout_s, self.registry = timeout_s, registry
        self.workers = [_Worker(registry) for _ in range(workers)]

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.workers = []

    def grade(self, attempts: Sequence[Attempt], parts: Sequence[str]) -> list[Grade]:
        """One grade an attempt, in their order. Raises RuntimeError where a worker cannot even start."""
        assert self.workers, "the pool is closed"
        waiting = deque(range(len(attempts)))
        grades: dict[int, Grade] = {}
        while len(grades) < len(attempts):
            for slot, worker in enumerate(self.workers):
                if worker.awaited or not waiting:
                    continue
                try:
                    message = {"parts": list(parts), "attempt": asdict(attempts[waiting[0]])}
                    worker.send(waiting[0], message, self.timeout_s)
                    waiting.popleft()
                except BrokenPipeError:  # it died idle: the attempt goes to its successor
                    self._replace(slot)
            grades |= self._collect()
        return [grades[i] for i in range(len(attempts))]

    def _collect(self) -> dict[int, Grade]:
        """Waits for the next answer or deadline; the grades that this settled, by index of the attempt."""
        awaited = [slot for slot, worker in enumerate(self.workers) if worker.awaited]
        first_deadline = min(self.workers[slot].deadline for slot in awaited)
        with selectors.DefaultSelector() as selector:
            for slot in awaited:
                selector.register(self.workers[slot].stdout, selectors.EVENT_READ, slot)
            readable = {key.data for key, _ in selector.select(max(0.0, first_deadline - time.monotonic()))}
        settled: dict[int, Grade] = {}
        for slot in awaited:
            worker = self.workers[slot]
            failure = None
            if slot in readable:
                try:
                    answer = worker.receive()
                except EOFError:
                    failure = "the grader's process died"
                else:
                    self._take(worker, answer, settled)
            elif time.monotonic() >= worker.deadline:
                failure = f"no grade within {self.timeout_s} s"
            if failure is not None:
                self._fail(slot, failure, settled)
        return settled

    def _take(self, worker: _Worker, answer: dict[str, Any] | None, settled: dict[int, Grade]) -> None:
        if answer is None:
            return
        if not worker.started:
            worker.started = True
            return
        assert worker.job is not None
        settled[worker.job] = Grade(answer.get("parts"), answer.get("error"))
        worker.job = None

    def _fail(self, slot: int, failure: str, settled: dict[int, Grade]) -> None:
        worker = self.workers[slot]
        if worker.job is None:
            raise RuntimeError(
                f"a reward worker did not start: `{sys.executable} -m rl.rewards.worker {self.registry}` shows why"
            )
        settled[worker.job] = Grade(None, failure)
        self._replace(slot)

    def _replace(self, slot: int) -> None:
        self.workers[slot].kill()
        self.workers[slot] = _Worker(self.registry)
