"""Worker processes that can be killed: each takes one job at a time, a JSON object a line, and has a deadline for it.

A worker is an interpreter of its own (no fork of the trainer, no import of its main module) in its own process group.
A job past its deadline gets the whole group killed and a new worker started; what it leaves is an error, like that of a
worker that died.
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
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120.0  # imports of a fresh worker on a busy machine


class _Worker:
    """One child process: starting until it says so, then idle or busy with one job."""

    def __init__(self, program: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", *program],
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
        self.job: int | None = None  # index of the job in hand
        self.timeout_s = START_TIMEOUT_S
        self.deadline = time.monotonic() + START_TIMEOUT_S

    @property
    def awaited(self) -> bool:
        return not self.started or self.job is not None

    def send(self, index: int, message: dict[str, Any], timeout_s: float) -> None:
        self.stdin.write(json.dumps(message).encode() + b"\n")
        self.stdin.flush()
        self.job, self.timeout_s, self.deadline = index, timeout_s, time.monotonic() + timeout_s

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
        """Ends the worker and whatever it started."""
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # a job that a dead worker never read
            self.stdin.close()


class WorkerPool:
    """`workers` processes of `python -m PROGRAM` (which calls `rl.rewards.worker.serve`); a context manager."""

    def __init__(self, program: Sequence[str], workers: int) -> None:
        self.program = tuple(program)
        self.workers = [_Worker(self.program) for _ in range(workers)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.workers = []

    def run(self, jobs: Sequence[dict[str, Any]], timeouts_s: Sequence[float]) -> list[dict[str, Any]]:
        """One answer a job, in their order; {"error": reason, "killed": true} where there is none.

        timeouts_s: seconds of each job. Raises RuntimeError where a worker cannot even start.
        """
        assert self.workers, "the pool is closed"
        waiting = deque(range(len(jobs)))
        answers: dict[int, dict[str, Any]] = {}
        while len(answers) < len(jobs):
            for slot, worker in enumerate(self.workers):
                if worker.awaited or not waiting:
                    continue
                try:
                    worker.send(waiting[0], jobs[waiting[0]], timeouts_s[waiting[0]])
                    waiting.popleft()
                except BrokenPipeError:  # it died idle: the job goes to its successor
                    self._replace(slot)
            answers |= self._collect()
        return [answers[i] for i in range(len(jobs))]

    def _collect(self) -> dict[int, dict[str, Any]]:
        """Waits for the next answer or deadline; the answers that this settled, by index of the job."""
        awaited = [slot for slot, worker in enumerate(self.workers) if worker.awaited]
        first_deadline = min(self.workers[slot].deadline for slot in awaited)
        with selectors.DefaultSelector() as selector:
            for slot in awaited:
                selector.register(self.workers[slot].stdout, selectors.EVENT_READ, slot)
            readable = {key.data for key, _ in selector.select(max(0.0, first_deadline - time.monotonic()))}
        settled: dict[int, dict[str, Any]] = {}
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
                failure = f"no grade within {worker.timeout_s} s"
            if failure is not None:
                self._fail(slot, failure, settled)
        return settled

    def _take(self, worker: _Worker, answer: dict[str, Any] | None, settled: dict[int, dict[str, Any]]) -> None:
        if answer is None:
            return
        if not worker.started:
            worker.started = True
            return
        assert worker.job is not None
        settled[worker.job] = answer
        worker.job = None

    def _fail(self, slot: int, failure: str, settled: dict[int, dict[str, Any]]) -> None:
        worker = self.workers[slot]
        if worker.job is None:
            command = " ".join([sys.executable, "-m", *self.program])
            raise RuntimeError(f"a reward worker did not start: `{command}` shows why")
        settled[worker.job] = {"error": failure, "killed": True}
        self._replace(slot)

    def _replace(self, slot: int) -> None:
        self.workers[slot].kill()
        self.workers[slot] = _Worker(self.program)
