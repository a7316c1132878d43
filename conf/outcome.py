"""How a run ends, for whoever looks from outside: what a finished one leaves, and the status of one that was stopped.

Part of the command-line contract; without torch, so that what strings runs together need not import it."""

from __future__ import annotations

import signal
from pathlib import Path

FINISHED = ("hf/config.json", "evaluation.json")  # of a training run, of an evaluation; each written whole
PREEMPTED_STATUS = 128 + signal.SIGTERM


def finished(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in FINISHED)
