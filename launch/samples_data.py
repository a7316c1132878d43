"""What the sample viewer reads: samples.jsonl of each run -> rows of plain values that its script can take on trust.

All of it is untrusted (another's run, a model's output), and rows of earlier versions lack fields: here every value
gets its type or becomes null, hidden characters become visible, and lists over tokens are as long as the tokens are
many or left out. Of a large file the newest samples are read.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import UserError
from launch.report_data import json_lines, run_names
from launch.report_html import visible

FILE_NAME = "samples.jsonl"
MOST_BYTES = 128 * 2**20  # of samples.jsonl, of all runs together: what a browser still opens in seconds
NUMBERS = (
    *("step", "reward", "advantage", "tokens", "prompt_index", "sample_index", "group_size", "group_reward"),
    *("max_log_ratio", "clip_frac", "off_policy_kl"),
)
TEXTS = ("domain", "prompt", "answer", "rubric", "finish_reason")
TOKEN_NUMBERS = {"behaviour_logprobs": 4, "logprobs": 4, "ratios": 5, "kept": 6}  # -> digits worth showing


@dataclass
class Samples:
    """Names of the runs, their samples (`run` is an index into the names), and what a reader should know."""

    names: list[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load_samples(folders: list[Path], most_bytes: int = MOST_BYTES) -> Samples:
    """Every run once, in the order given. Raises UserError where one has no samples."""
    once = list({folder.resolve(): folder for folder in folders}.values())
    found = Samples(run_names(once))
    for run, folder in enumerate(once):
        path = folder / FILE_NAME
        if not folder.is_dir():
            raise UserError(f"no run at {folder}: give the output_dir of a GRPO run")
        if not path.is_file():
            raise UserError(f"{folder} holds no {FILE_NAME}: give the output_dir of a GRPO run that logged a step")
        try:
            rows = _newest(path, most_bytes // len(once), found)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        found.rows += [{"run": run, **_row(row)} for row in rows]
    if not found.rows:
        raise UserError(f"{once[0] / FILE_NAME} holds no samples: give a GRPO run that logged a step")
    return found


def _newest(path: Path, most_bytes: int, found: Samples) -> list[dict[str, Any]]:
    """The whole lines in the last `most_bytes` of the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size > most_bytes:
            file.seek(size - most_bytes)
            file.readline()  # the rest of a line
            left_out = file.tell()
            found.notes.append(f"{path}: the first {left_out / 2**20:.0f} MiB of {size / 2**20:.0f} are left out")
        return json_lines(file)


def _row(raw: dict[str, Any]) -> dict[str, Any]:
    """One sample in the page's form; null where the file has nothing that can be shown."""
    row: dict[str, Any] = {name: _number(raw.get(name)) for name in NUMBERS}
    row |= {name: _text(raw.get(name)) for name in TEXTS}
    row |= {name: _numbers_by_name(raw.get(name)) for name in ("reward_parts", "reward_terms")}
    versions = raw.get("weight_versions")
    row["weight_versions"] = [_number(v) for v in versions] if isinstance(versions, list) else []
    row["off_policy_masked"] = raw.get("off_policy_masked") is True
    per_token = raw.get("per_token")
    text = raw.get("text")
    row["per_token"] = _per_token(per_token, str(text)) if isinstance(per_token, dict) else None
    row["text"] = None if row["per_token"] else _text(text)  # the pieces have it
    return row


def _number(value: Any, digits: int | None = None) -> float | int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return value if digits is None else float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _text(value: Any) -> str | None:
    if value is None:
        return None
    return visible(value if isinstance(value, str) else json.dumps(value))


def _numbers_by_name(value: Any) -> dict[str, Any]:
    return {visible(name): _number(v) for name, v in value.items()} if isinstance(value, dict) else {}


def _per_token(columns: dict[str, Any], text: str) -> dict[str, Any] | None:
    """Lists as long as the pieces; None where there are no pieces that make up the text."""
    pieces = columns.get("text")
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces) or "".join(pieces) != text:
        return None
    found: dict[str, Any] = {"text": [visible(piece) for piece in pieces]}
    for name, digits in TOKEN_NUMBERS.items():
        column = columns.get(name)
        column = column if isinstance(column, list) and len(column) == len(pieces) else None
        found[name] = None if column is None else [_number(value, digits) for value in column]
    clipped = columns.get("clipped")
    places = [place for place, value in enumerate(clipped) if value is True] if isinstance(clipped, list) else []
    found["clipped"] = [place for place in places if place < len(pieces)]  # few are
    return found
