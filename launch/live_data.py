"""What the live page is told: the runs below some folders, and their metrics kept up with files that grow.

A run's metrics.jsonl is read on from where the last look ended, whole lines only. A resumed run moves a shorter file
into place and another hand may rewrite it: then it is read anew. Only what panels show is kept, as columns, and what
goes to the page is thinned to about a chart's pixels, with the least and the largest value that a point stands for.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from array import array
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from launch.panels import PANELS
from launch.report_data import Run, read_alerts, read_config, read_error
from launch.report_html import visible
from train.metrics import FILE_NAME, Value, parse_row

CHUNK = 4 * 2**20  # bytes read at a time; a longer line is no row
PATIENCE_S = 1.0  # of one look: of a long run the page shows first what there is so far
TAIL = 64  # bytes before the place read up to, to see whether the file is still the same
MOST_POINTS = 320
MOST_KEYS = 512
LAST_BYTES = 256 * 2**10  # in which the last row is looked for
STILL_S = 600.0  # without a row before an unfinished run is no longer called running
DEPTH = 2  # folders below a given one in which runs are looked for
READ = (FILE_NAME, "config.yaml", "evaluation.json", "samples.jsonl", "alerts.jsonl", "error.txt")  # of a run
AXES = ("step", "tokens", "hours")
PATTERNS = re.compile("|".join({panel.pattern for panels in PANELS.values() for panel in panels}))


@lru_cache(4096)
def wanted(key: str) -> bool:
    return PATTERNS.match(key) is not None


class Follower:
    """The columns of one metrics.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._offset, self._inode, self._tail = 0, -1, b""
        self.axes = {name: array("d") for name in AXES}
        self.columns: dict[str, tuple[array[int], array[float]]] = {}  # key -> (numbers of its rows, values)

    def __len__(self) -> int:
        return len(self.axes["step"])

    def refresh(self, seconds: float = PATIENCE_S) -> bool:
        """Reads what is new for about so long; True where there is more to read. A file that is gone, or not readable
        for the moment, leaves the rows as they were."""
        with self._lock:
            try:
                with open(self.path, "rb") as file:
                    if not self._is_same(file):
                        self._reset()
                    self._inode = os.fstat(file.fileno()).st_ino
                    return self._read(file, time.monotonic() + seconds)
            except OSError:
                return False

    def _is_same(self, file: Any) -> bool:
        found = os.fstat(file.fileno())
        if found.st_ino != self._inode or found.st_size < self._offset:
            return False
        file.seek(self._offset - len(self._tail))
        return bool(file.read(len(self._tail)) == self._tail)

    def _read(self, file: Any, until: float) -> bool:
        file.seek(self._offset)
        while chunk := file.read(CHUNK):
            end = chunk.rfind(b"\n") + 1
            if not end and len(chunk) < CHUNK:
                break  # a line that is still being written
            whole = chunk[:end] if end else chunk
            for line in whole.splitlines() if end else ():
                row = parse_row(line)
                if row is not None:
                    self._add(row)
            self._offset += len(whole)
            self._tail = (self._tail + whole)[-TAIL:]
            if time.monotonic() > until:
                return len(chunk) == CHUNK
            file.seek(self._offset)
        return False

    def _add(self, row: dict[str, Value]) -> None:
        step = float(row["step"] or 0)
        if len(self) and step <= self.axes["step"][-1]:
            self._cut_back(step)
        last_tokens, hours = (self.axes["tokens"][-1], self.axes["hours"][-1]) if len(self) else (0.0, 0.0)
        tokens = max(last_tokens, float(row.get("tokens") or 0))
        rate = row.get("perf/tokens_per_s")
        if rate and rate > 0:
            hours += (tokens - last_tokens) / rate / 3600
        number = len(self)
        for name, value in zip(AXES, (step, tokens, hours), strict=True):
            self.axes[name].append(value)
        for key, found in row.items():
            if key not in self.columns:
                if not wanted(key) or len(self.columns) >= MOST_KEYS:
                    continue
                self.columns[key] = array("q"), array("d")
            rows, values = self.columns[key]
            rows.append(number)
            values.append(math.nan if found is None else found)

    def _cut_back(self, step: float) -> None:
        """Rows from `step` on are of an earlier attempt."""
        keep = int(np.searchsorted(np.frombuffer(self.axes["step"]), step))
        for axis in self.axes.values():
            del axis[keep:]
        for rows, values in self.columns.values():
            left = int(np.searchsorted(np.frombuffer(rows, np.int64), keep)) if rows else 0
            del rows[left:], values[left:]

    def series(self, axis: str, low: float = -math.inf, high: float = math.inf) -> dict[str, dict[str, Any]]:
        """key -> {"x", "y"} and, where a point stands for several rows, {"low", "high"}; of `low` to `high` on the axis
        and one point beyond at either end. What is not finite is None."""
        with self._lock:
            xs = np.array(self.axes[axis])
            held = {key: (np.array(r), np.array(v)) for key, (r, v) in self.columns.items() if len(r)}
        return {key: thinned(xs[rows], values, low, high) for key, (rows, values) in held.items()}


def thinned(x: Any, y: Any, low: float = -math.inf, high: float = math.inf, most: int = MOST_POINTS) -> dict[str, Any]:
    """Arrays of rows -> at most about `most` points: means over equally many rows, with least and largest."""
    first, stop = np.searchsorted(x, low, "left"), np.searchsorted(x, high, "right")
    x, y = x[max(0, first - 1) : stop + 1], y[max(0, first - 1) : stop + 1]
    size = -(-len(y) // most)
    if size <= 1:
        return {"x": _plain(x), "y": _plain(y)}
    starts = np.arange(0, len(y), size)
    finite = np.isfinite(y)
    counts = np.add.reduceat(finite.astype(float), starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.add.reduceat(np.where(finite, y, 0.0), starts) / counts
    least = np.minimum.reduceat(np.where(finite, y, np.inf), starts)
    largest = np.maximum.reduceat(np.where(finite, y, -np.inf), starts)
    middle = x[np.minimum(starts + size // 2, len(x) - 1)]
    middle[0], middle[-1] = x[0], x[-1]
    return {"x": _plain(middle), "y": _plain(means), "low": _plain(least), "high": _plain(largest)}


def _plain(values: Any) -> list[float | None]:
    """Seven digits, which tell steps apart that a chart can; None for what is not finite."""
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values.tolist()]


class Watched:
    """The runs in some folders: each folder itself where it holds a run, and those below it."""

    def __init__(self, roots: Iterable[Path]) -> None:
        self.roots = list({root.resolve(): root for root in roots}.values())
        self._lock = threading.Lock()
        self._followers: dict[Path, Follower] = {}
        self._configs: dict[Path, tuple[int, dict[str, Any]]] = {}

    def folders(self) -> dict[str, Path]:
        """name -> folder of every run there is now: its path below the folder given, whose own name opens it where
        several were given. Links are not followed: what is served is in the folders given."""
        found: dict[str, Path] = {}
        seen: set[Path] = set()
        for root in self.roots:
            for folder in _runs_below(root, DEPTH):
                if folder.resolve() in seen:
                    continue
                seen.add(folder.resolve())
                below = folder.relative_to(root).parts
                name = "/".join(below if below and len(self.roots) == 1 else (root.resolve().name, *below))
                while name in found:
                    name += "'"  # two folders of one name were given
                found[name] = folder
        return found

    def follower(self, folder: Path) -> Follower:
        with self._lock:
            return self._followers.setdefault(folder, Follower(folder / FILE_NAME))

    def told(self) -> list[dict[str, Any]]:
        """What the list of runs says of each, by name."""
        told = (self._told(name, folder) for name, folder in sorted(self.folders().items()))
        return [run for run in told if run]

    def _told(self, name: str, folder: Path) -> dict[str, Any]:
        path = folder / FILE_NAME
        row = last_row(path)
        run = Run(name, folder, [row], error=read_error(folder), preempted=(folder / "preempted").exists())
        run.config = self._config(folder)
        stage, steps = run.config.get("stage"), run.config.get("train.steps")
        try:
            stat = path.stat()
        except OSError:  # taken away meanwhile
            return {}
        age = max(0.0, time.time() - stat.st_mtime)
        return {
            "name": name,
            "given": folder in self.roots,  # not found below a folder that was given
            "shown": visible(name),
            "stage": stage if stage in PANELS else None,
            "state": "running" if run.state == "unfinished" and age < STILL_S else run.state,
            "step": run.last_step,
            "steps": steps if isinstance(steps, int) else None,
            "age": round(age, 1),
            "version": f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}",
            "samples": (folder / "samples.jsonl").is_file(),
            "error": visible(run.error[:500]),
            "alerts": [visible(alert) for alert in read_alerts(folder)],
        }

    def _config(self, folder: Path) -> dict[str, Any]:
        """config.yaml, parsed once as long as it stays the same."""
        path = folder / "config.yaml"
        written = path.stat().st_mtime_ns if path.is_file() else 0
        with self._lock:
            known = self._configs.get(folder)
        if known is None or known[0] != written:
            known = written, read_config(folder)
            with self._lock:
                self._configs[folder] = known
        return known[1]


def last_row(path: Path) -> dict[str, Value]:
    """The newest whole row, read from the end of the file; step 0 where there is none."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - LAST_BYTES))
            lines = file.read().splitlines()
    except OSError:
        lines = []
    rows = (parse_row(line) for line in reversed(lines))
    return next((row for row in rows if row is not None), {"step": 0})


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / FILE_NAME).is_file() and not any((folder / name).is_symlink() for name in READ):
        yield folder
    if depth:
        try:
            inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
        except OSError:
            return
        for path in inside:
            if not path.name.startswith(".") and path.name not in ("checkpoints", "wandb", "hf", "tokenizer"):
                yield from _runs_below(path, depth - 1)


def declaration() -> str:
    """The panels as the page's script reads them."""
    stages = {}
    for stage, panels in PANELS.items():
        stages[stage] = [
            {
                "keys": panel.keys,
                "title": panel.title,
                "pattern": panel.pattern if panel.is_pattern else None,
                "unit": panel.metric.unit,
                "log": panel.metric.log,
                "share": panel.metric.share,
            }
            for panel in panels
        ]
    return json.dumps(stages)
