"""What the judge was asked and what it said: cache and budget of a run, one file a rank, `judge.rank_0.jsonl`.

A line is either `{"requests": n}`, written before n requests leave, so that a kill never hides one; or a settled
question, `{"key", "score", "reply"}`, or `{"key", "error", "reply"}` where it had no score, which is kept for people
alone. A resumed run finds both what it has spent and every score it had: the iterations that it repeats cost nothing
and end in the same rewards.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Ledger:
    """Appends to `path`; `scores` by key and `spent` requests are read back from it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scores: dict[str, float] = {}
        self.spent = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.read_bytes() if path.exists() else b""
        for line in written.splitlines():
            try:
                self._take(json.loads(line))
            except ValueError:  # torn by a kill
                continue
        if written and not written.endswith(b"\n"):
            with open(path, "ab") as file:
                file.write(b"\n")

    def _take(self, row: dict[str, Any]) -> None:
        self.spent += row.get("requests", 0)
        if "score" in row:
            self.scores[row["key"]] = row["score"]

    def _write(self, row: dict[str, Any]) -> None:
        with open(self.path, "ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
        self._take(row)

    def spend(self, requests: int) -> None:
        self._write({"requests": requests})

    def settle(self, key: str, score: float, reply: str) -> None:
        self._write({"key": key, "score": score, "reply": reply})

    def fail(self, key: str, error: str, reply: str) -> None:
        self._write({"key": key, "error": error, "reply": reply})
