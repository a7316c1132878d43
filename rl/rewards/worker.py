"""The process in which graders run: `python -m rl.rewards.worker MODULE:REGISTRY`, one JSON object a line in and out.

In:  {"parts": [names], "attempt": {...}}        out: {"parts": {name: value}} or {"error": "Type: message"}
The first line out is {"ready": true}. Whatever a grader prints goes to stderr, so that it cannot pose as a result.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from rl.rewards.attempt import Attempt


def _grade(registry: dict[str, Callable[[Attempt], float]], job: dict[str, Any]) -> dict[str, Any]:
    attempt = Attempt(**job["attempt"])
    try:  # a process border: whatever a grader raises becomes a counted failure in the trainer
        values = {name: float(registry[name](attempt)) for name in job["parts"]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    return {"error": f"not a finite number: {bad}"} if bad else {"parts": values}


def _leave_with(parent: int) -> None:
    """Ends this process once its parent is gone: a trainer killed in the middle of a grade leaves nothing behind."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def serve(open_handler: Callable[[], Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Answers jobs until stdin ends. `open_handler` makes what answers one; its imports happen here."""
    # a scheduler sends SIGTERM to every process of a job, and the step in which the trainer then saves needs its grades
    signal.signal(signal.SIGTERM, lambda *_: None)
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as results:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        handle = open_handler()
        answer: dict[str, Any] = {"ready": True}
        while True:
            results.write(json.dumps(answer) + "\n")
            results.flush()
            line = sys.stdin.readline()
            if not line:
                return
            answer = handle(json.loads(line))


def _grader() -> Callable[[dict[str, Any]], dict[str, Any]]:
    module, _, name = sys.argv[1].partition(":")
    registry = vars(importlib.import_module(module))[name]
    return lambda job: _grade(registry, job)


if __name__ == "__main__":
    serve(_grader)
