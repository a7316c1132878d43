"""What the sample viewer reads: samples.jsonl of each run -> rows of plain values that its script can take on trust.

All of it is untrusted (another's run, a model's output), and rows of earlier versions lack fields: here every value
gets its type or becomes null, hidden characters become visible, and lists over tokens are as long as the tokens are
many or left out; `flow` is the sample in the order it came in (launch/samples_flow.py). Of a large file the newest
samples are read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import UserError
from launch.report_data import json_lines, run_names
from launch.report_html import visible
from launch.samples_flow import Between, Call, as_json, flow_of, is_text_of, plain_flow

FILE_NAME = "samples.jsonl"
MOST_BYTES = 128 * 2**20  # of samples.jsonl, of all runs together: what a browser still opens in seconds
NUMBERS = (
    *("step", "reward", "advantage", "tokens", "prompt_index", "sample_index", "group_size", "group_reward"),
    *("max_log_ratio", "clip_frac", "off_policy_kl", "num_calls"),
)
TEXTS = ("domain", "prompt", "answer", "rubric", "finish_reason", "env", "verdict_error")
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
    return row | _told(raw, row["finish_reason"])


def _told(raw: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    """The sample's tokens, where the file has those of its text, and its flow."""
    columns = raw.get("per_token")
    columns = columns if isinstance(columns, dict) else {}
    text = raw.get("text")
    text = "" if text is None else text if isinstance(text, str) else as_json(text)
    calls, pieces = _calls(raw.get("calls")), columns.get("text")
    found: dict[str, Any] = {"per_token": None}
    flow = plain_flow(text, calls)
    if isinstance(pieces, list) and all(isinstance(piece, str) for piece in pieces):
        between = _between(columns.get("between"), len(pieces))
        if is_text_of(pieces, between, calls, text):
            flow = flow_of(pieces, between, calls, finish_reason)
            found["per_token"] = _per_token(columns, pieces) | {"ends": flow.ends}
    return found | {"flow": flow.parts, "turns": flow.turns, "errors": flow.errors, "malformed": flow.malformed}


def _number(value: Any, digits: int | None = None) -> float | int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return value if digits is None else float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _text(value: Any) -> str | None:
    return None if value is None else visible(value if isinstance(value, str) else as_json(value))


def _numbers_by_name(value: Any) -> dict[str, Any]:
    return {visible(name): _number(v) for name, v in value.items()} if isinstance(value, dict) else {}


def _calls(value: Any) -> list[Call]:
    """The objects among the entries, each with a name at least."""
    return [
        Call(
            name=call["name"],
            arguments=call.get("arguments"),
            result=call["result"] if isinstance(call.get("result"), str) else "",
            error=call.get("error") is True,
            seconds=_number(call.get("seconds"), 4),
            ended=call.get("ended") is True,
        )
        for call in (value if isinstance(value, list) else [])
        if isinstance(call, dict) and isinstance(call.get("name"), str)
    ]


def _between(value: Any, size: int) -> list[Between]:
    """The entries with a place inside the sample and a text."""
    return [
        Between(entry["before"], entry["text"], entry.get("row") is True)
        for entry in (value if isinstance(value, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("text"), str)
        if type(entry.get("before")) is int and 0 <= entry["before"] <= size
    ]


def _per_token(columns: dict[str, Any], pieces: list[str]) -> dict[str, Any]:
    """Lists as long as the pieces, or null."""
    found: dict[str, Any] = {"text": [visible(piece) for piece in pieces]}
    for name, digits in TOKEN_NUMBERS.items():
        column = columns.get(name)
        column = column if isinstance(column, list) and len(column) == len(pieces) else None
        found[name] = None if column is None else [_number(value, digits) for value in column]
    clipped = columns.get("clipped")
    places = [place for place, value in enumerate(clipped) if value is True] if isinstance(clipped, list) else []
    found["clipped"] = [place for place in places if place < len(pieces)]  # few are
    return found
