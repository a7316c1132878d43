"""`metrics.jsonl`: what a run measured, one flat JSON object a logged step, each step once.

The file is the only source of the HTML report and holds what W&B gets, key for key. Values are finite floats or null: a
NaN would make the line invalid JSON for every other reader, and it stays visible as the null it becomes. A resumed run
first cuts the file back to its checkpoint, so a killed and resumed run leaves the file of an uninterrupted one.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
Value = float | int | None
_DECODER = json.JSONDecoder(parse_constant=lambda _: None)  # one for all lines: making it costs as much as a line


def clean_row(row: Mapping[str, Any]) -> dict[str, Value]:
    """The row with NaN and infinities as null. Anything but int, float or None (a tensor, a dict) is our mistake."""
    cleaned: dict[str, Value] = {}
    for key, value in row.items():
        plain = value is None or isinstance(value, (int, float)) and not isinstance(value, bool)
        assert plain, f"metric {key} is a {type(value).__name__}, not a plain number: call .item() on it"
        cleaned[key] = value if value is not None and math.isfinite(value) else None
    return cleaned


def clean_tables(value: Any) -> Any:
    """Rows in lists and dicts with None for every number that is not finite, as JSON has it."""
    if isinstance(value, dict):
        return {name: clean_tables(each) for name, each in value.items()}
    if isinstance(value, list):
        return [clean_tables(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_row(line: bytes | str) -> dict[str, Value] | None:
    """One line -> its row; None where the line is torn or no metrics row. Numbers that are not finite are None."""
    try:
        row = _DECODER.decode(line if isinstance(line, str) else line.decode())
    except (ValueError, RecursionError):  # ValueError: no JSON, or no UTF-8
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
        return None
    return {key: value if _finite(value) else None for key, value in row.items()}


def _finite(value: Any) -> bool:
    if type(value) is float:
        return math.isfinite(value)
    return type(value) is int and abs(value) < 2**63


def read_metrics(path: str | Path) -> tuple[list[dict[str, Value]], int]:
    """(rows in the order of their steps, number of unreadable lines). A step that occurs twice is its last row."""
    rows: dict[int, dict[str, Value]] = {}
    unreadable = 0
    with open(path, "rb") as file:
        for line in file:
            row = parse_row(line)
            if row is not None:
                step = row["step"]
                assert isinstance(step, int)
                rows[step] = row
            elif line.strip():
                unreadable += 1
    return [rows[step] for step in sorted(rows)], unreadable


class MetricsWriter:
    """Appends to `output_dir/metrics.jsonl`; one process a run makes one (rank 0).

    `resume_step` is the step of the checkpoint that the run goes on from: later rows and torn lines are cut away.
    None is a run that starts: rows of an earlier attempt, which left no checkpoint, are dropped.
    """

    def __init__(self, output_dir: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(output_dir) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.last_step = -1
        if self.path.exists():
            self._cut_back(-1 if resume_step is None else resume_step)
        self._file = open(self.path, "ab")  # noqa: SIM115  (open as long as the run)

    def _cut_back(self, resume_step: int) -> None:
        """Rewrites the file with the steps that the checkpoint has seen: a temporary file, synced, moved into place."""
        rows, unreadable = read_metrics(self.path)
        if unreadable:
            log.warning("%s: %d unreadable line(s) left out", self.path, unreadable)
        kept = [row for row in rows if (row["step"] or 0) <= resume_step]
        partial = self.path.with_name(f".{FILE_NAME}.{os.getpid()}")
        with open(partial, "wb") as file:
            file.writelines(_encode(row) for row in kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)
        if kept:
            self.last_step = int(kept[-1]["step"] or 0)

    def write(self, step: int, row: Mapping[str, Any]) -> dict[str, Value]:
        """Appends one row and returns it as written. Raises ValueError where `step` is not past the last one."""
        if step <= self.last_step:
            raise ValueError(f"step {step} after step {self.last_step} in {self.path}: log each step once, in order")
        cleaned: dict[str, Value] = {"step": step, **clean_row({k: v for k, v in row.items() if k != "step"})}
        self._file.write(_encode(cleaned))
        self._file.flush()  # one write of a whole line: what is there survives a kill -9
        self.last_step = step
        return cleaned

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _encode(row: Mapping[str, Value]) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"
