"""Graders that misbehave, for the pool's tests; imported by its worker processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

from rl.rewards.attempt import Attempt


def by_text(attempt: Attempt) -> float:
    """Does what the text says."""
    if attempt.text == "sleep":
        time.sleep(600)
    if attempt.text == "child":  # leaves the id of a process that outlives a naive kill
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(attempt.prompt).write_text(f"{os.getpid()} {child.pid}")
        time.sleep(600)
    if attempt.text == "raise":
        raise KeyError("no such thing")
    if attempt.text == "exit":
        os._exit(3)
    if attempt.text == "print":
        print('{"parts": {"by_text": 99.0}}')
    if attempt.text == "nan":
        return float("nan")
    return float(len(attempt.text))


REWARDS = {"by_text": by_text}
