"""What the report reads: a run's folder -> plain values. All of it is untrusted: another's run, a model's output.

Only `metrics.jsonl` is needed; `config.yaml`, `evaluation.json`, `samples.jsonl`, `error.txt` and `preempted` are shown
where they are. A file that cannot be read becomes a note on the page, never a failed report.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from conf.errors import UserError
from train import alerts
from train.metrics import FILE_NAME, Value, read_metrics

LARGEST_FILE = 4 * 2**20  # bytes of a config, evaluation or error file that are worth reading
SAMPLES_HEAD, SAMPLES_TAIL = 64 * 2**10, 512 * 2**10  # bytes read at either end of samples.jsonl
FIRST_SAMPLES, LAST_SAMPLES = 2, 4
MOST_ALERTS = 20


@dataclass
class Run:
    """One run as the page shows it."""

    name: str
    folder: Path
    rows: list[dict[str, Value]]
    config: dict[str, Any] = field(default_factory=dict)  # dotted key -> value
    evaluation: dict[str, Any] = field(default_factory=dict)  # dotted or slashed key -> number or text
    samples: list[dict[str, Any]] = field(default_factory=list)
    alerts: list[str] = field(default_factory=list)  # what train/alerts.py said, one line each
    error: str = ""
    preempted: bool = False
    notes: list[str] = field(default_factory=list)

    def series(self, key: str) -> list[tuple[int, float | None]]:
        """(step, value or None where it was not finite) of every row that has the key."""
        return [(int(row["step"] or 0), row[key]) for row in self.rows if key in row]

    def keys(self) -> set[str]:
        return {key for row in self.rows for key in row} - {"step", "tokens"}

    @property
    def last_step(self) -> int:
        return int(self.rows[-1]["step"] or 0) if self.rows else 0

    @property
    def state(self) -> str:
        steps = self.config.get("train.steps")
        if self.error:
            return "failed"
        if self.preempted:
            return "preempted"
        if self.config.get("stage") == "evaluate" or not isinstance(steps, int):
            return "finished"
        return "finished" if self.last_step >= steps else "unfinished"


def flatten(values: Any, separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> one dict with joined keys."""
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, separator, f"{prefix}{separator}{key}" if prefix else str(key))
    return flat


def _read(run: Run, name: str) -> str | None:
    """The start of a side file, or None where there is none. What is no UTF-8 is shown as the replacement character."""
    path = run.folder / name
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            return file.read(LARGEST_FILE).decode("utf-8", errors="replace")
    except OSError as error:
        run.notes.append(f"{name} cannot be read: {error.strerror}")
        return None


def _parsed(run: Run, name: str, separator: str, parse: Any) -> dict[str, Any]:
    source = _read(run, name)
    if source is None:
        return {}
    try:
        values = parse(source)
        flat = flatten(values, separator) if isinstance(values, dict) else {}
    except (ValueError, yaml.YAMLError, RecursionError):
        run.notes.append(f"{name} is damaged and was left out")
        return {}
    return {key: _shown(value) for key, value in flat.items()}


def _shown(value: Any) -> Any:
    """Numbers that a table can format; an integer past 64 bits as text, what is not finite as None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, int) and abs(value) >= 2**63 else value


def _numbers(source: str) -> Any:
    """evaluation.json without its tables and verdict, which have a page of their own (launch/evaluation.py)."""
    found = json.loads(source)
    return {k: v for k, v in found.items() if not isinstance(v, dict | list)} if isinstance(found, dict) else found


class _NoAliases(yaml.SafeLoader):
    """YAML without references: a few hundred bytes of them can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a reference")
        return super().compose_node(parent, index)


def _yaml(source: str) -> Any:
    return yaml.load(source, _NoAliases)  # a SafeLoader: plain values only


def read_config(folder: Path) -> dict[str, Any]:
    """config.yaml as dotted key -> value; empty where there is none or it is damaged."""
    return _parsed(Run("", folder, []), "config.yaml", ".", _yaml)


def read_error(folder: Path) -> str:
    return (_read(Run("", folder, []), "error.txt") or "").strip()


def read_alerts(folder: Path) -> list[str]:
    """The newest alerts of a run, oldest first, as lines to show."""
    lines = (_read(Run("", folder, []), alerts.FILE_NAME) or "").encode().splitlines()
    found = json_lines(lines[-MOST_ALERTS:])
    return [f"step {row.get('step')}: {row['text']}" for row in found if isinstance(row.get("text"), str)]


def json_lines(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """The objects among the lines."""
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # torn, or the part of a line at the border of what was read
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def _samples(path: Path) -> list[dict[str, Any]]:
    """The first and the last few samples; a file of any size costs two small reads."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        size = path.stat().st_size
        if size <= SAMPLES_HEAD + SAMPLES_TAIL:
            rows = json_lines(file)
            return rows if len(rows) <= FIRST_SAMPLES + LAST_SAMPLES else rows[:FIRST_SAMPLES] + rows[-LAST_SAMPLES:]
        head = json_lines(file.read(SAMPLES_HEAD).splitlines())
        file.seek(size - SAMPLES_TAIL)
        return head[:FIRST_SAMPLES] + json_lines(file.read().splitlines())[-LAST_SAMPLES:]


def load_run(folder: Path, name: str) -> Run:
    """Reads one run. Raises UserError where the folder holds no metrics."""
    path = folder / FILE_NAME
    if not folder.is_dir():
        raise UserError(f"no run at {folder}: give the output_dir of a run")
    if not path.is_file():
        inside = sorted(str(found.parent) for found in folder.glob(f"*/{FILE_NAME}"))
        hint = f"did you mean {' '.join(inside[:6])}?" if inside else "give the output_dir of a run that logged a step"
        raise UserError(f"{folder} holds no {FILE_NAME}: {hint}")
    try:
        rows, unreadable = read_metrics(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not rows:
        raise UserError(f"{path} holds no metrics: give the output_dir of a run that logged a step")
    run = Run(name, folder, rows)
    if unreadable:
        run.notes.append(f"{unreadable} unreadable line{'s' * (unreadable > 1)} of {FILE_NAME} left out")
    run.config = _parsed(run, "config.yaml", ".", _yaml)
    run.evaluation = _parsed(run, "evaluation.json", "/", _numbers)
    run.samples = _samples(folder / "samples.jsonl")
    run.alerts = read_alerts(folder)
    run.error = (_read(run, "error.txt") or "").strip()
    run.preempted = (folder / "preempted").exists()
    return run


def run_names(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart: `base`, or `a/base` and `b/base`."""
    parts = [folder.absolute().parts for folder in folders]
    names = []
    for own in parts:
        others = [other for other in parts if other != own]
        depth = next(n for n in range(1, len(own) + 1) if n == len(own) or all(o[-n:] != own[-n:] for o in others))
        names.append("/".join(own[-depth:]))
    return names


def load_runs(folders: list[Path]) -> list[Run]:
    """Every run once, in the order given. Raises UserError where one has no metrics."""
    once = list({folder.resolve(): folder for folder in folders}.values())
    return [load_run(folder, name) for folder, name in zip(once, run_names(once), strict=True)]
