"""A sample in the order it came in: thoughts, calls, what the tools gave back, the answer, and where the context began
anew. For the sample viewer, which draws the parts one below the other.

A part knows its tokens, `first` to `stop`; where a sample's tokens are not at hand it has a `text` instead. Calls are
read from the text as the rollout read them (`parse_turn`), and a record of what came of one is believed only where name
and arguments are the same: file and text are untrusted. All texts in parts are `visible`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from data.calls import ToolCall
from data.chat import END_RESULT, END_RESULTS, RESULT, RESULTS
from data.dsml import OPENER, Turn, parse_turn
from data.tokenizer import END_THINK, THINK
from launch.report_html import visible

Part = dict[str, Any]
LONGEST_NAME = 100  # characters of a tool's name in a record, see rl/tools/runner.py
ONE_LINE = 80  # characters of a list or an object that need no lines of their own
ENDED = ("stop", "turns")  # finish reasons that leave the last message whole


@dataclass(frozen=True)
class Call:
    """The record of a call, typed."""

    name: str
    arguments: Any
    result: str
    error: bool = False
    seconds: float | None = None
    ended: bool = False


@dataclass(frozen=True)
class Between:
    """What stands before token `before` and was not sampled; `row`: the context began anew with it."""

    before: int
    text: str
    row: bool = False


@dataclass
class Flow:
    """parts: `kind` is thought, answer, aside (what is said beside a call), call, result, read (by the model, though no
    record tells of it) or anew. ends: tokens that end a message."""

    parts: list[Part] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    turns: int = 0  # messages
    errors: int = 0  # calls that failed
    malformed: int = 0  # messages whose calls nobody could read


def flow_of(
    pieces: Sequence[str], between: Sequence[Between], calls: Sequence[Call], finish_reason: str | None = None
) -> Flow:
    """`between`: inside the sample. Records that are of no call in the text come last: nothing is lost."""
    found = Flow(errors=sum(call.error for call in calls))
    left = list(calls)
    for first, stop, follows in _messages(pieces, between):
        if first < stop:
            found.turns += 1
            turn = parse_turn("".join(pieces[first:stop]))
            found.parts += _said(pieces, first, stop, turn)
            last = stop == len(pieces) and not follows
            if pieces[stop - 1] == "" and (not last or finish_reason in ENDED or turn.calls):
                found.ends.append(stop - 1)
            found.malformed += found.parts[-1].get("reason") is not None
            records = _records(turn.calls, left)
            found.parts += [_result(record, unread=last) for record in records]
            read = _read(records)
            follows = [entry for entry in follows if entry.row or not records or entry.text != read]
        found.parts += [_anew(entry) if entry.row else {"kind": "read", "text": _inside(entry)} for entry in follows]
    found.parts += _untold(left)
    return found


def plain_flow(text: str, calls: Sequence[Call]) -> Flow:
    """Where there are no tokens: the text as it was graded, and behind it the calls."""
    thought, closed, answer = text.partition(END_THINK)
    texts = {"thought": thought + closed, "answer": answer}
    parts: list[Part] = [{"kind": kind, "text": visible(shown)} for kind, shown in texts.items() if shown]
    return Flow(parts + _untold(calls), errors=sum(call.error for call in calls))


def is_text_of(pieces: Sequence[str], between: Sequence[Between], calls: Sequence[Call], text: str) -> bool:
    """Whether the tokens are those of the graded text, which with tools has all thoughts and then the answer, if it
    came to one."""
    if "".join(pieces) == text:
        return True
    turns = [parse_turn("".join(pieces[first:stop])) for first, stop, _ in _messages(pieces, between) if first < stop]
    thoughts = "\n".join(turn.reasoning for turn in turns)
    answers = [turn.content for turn in turns[-1:]] + [call.result for call in calls if call.ended]
    return text in (thoughts, *(thoughts + END_THINK + answer for answer in answers))


def shown_value(value: Any) -> str:
    """Any JSON value as text: a string as it is, a long list or object on lines of its own."""
    if isinstance(value, str):
        return visible(value)
    short = as_json(value)
    return visible(short if len(short) <= ONE_LINE else as_json(value, indent=2))


def as_json(value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent)
    except RecursionError:
        return "nested too deep to show"


def _messages(pieces: Sequence[str], between: Sequence[Between]) -> Iterator[tuple[int, int, list[Between]]]:
    """(first, last + 1) of each message and what follows it; an empty one for what comes before the first."""
    follows: dict[int, list[Between]] = {0: [], len(pieces): []}
    for entry in between:
        follows.setdefault(entry.before, []).append(entry)
    places = sorted(follows)
    for first, stop in zip([0, *places], places, strict=False):
        yield first, stop, follows[stop]


def _said(pieces: Sequence[str], first: int, stop: int, turn: Turn) -> list[Part]:
    """A message's thought, answer and block of calls, as far as it has them."""
    text = "".join(pieces[first:stop])
    closed = text.find(END_THINK)
    thought = 0 if closed < 0 else closed + len(END_THINK)
    called = text.find(OPENER, thought)
    block = len(text) if called < 0 else max(thought, len(text[:called].rstrip("\n")))
    spans = [("thought", thought or block), ("answer" if called < 0 else "aside", block), ("call", len(text))]
    starts = list(accumulate((len(piece) for piece in pieces[first:stop]), initial=0))
    parts: list[Part] = []
    at = first
    for number, (kind, border) in enumerate(spans):
        later = any(end > border for _, end in spans[number + 1 :])
        end = first + _token_at(starts, border) if later else stop
        if end > at:
            parts.append({"kind": kind, "first": at, "stop": end})
            at = end
    if called >= 0:
        told = [{"name": visible(call.name), "arguments": _arguments(call.arguments)} for call in turn.calls]
        reason = visible(turn.error.reason) if turn.error else None
        parts[-1] |= {"kind": "call", "calls": told, "reason": reason}
    return parts


def _token_at(starts: Sequence[int], border: int) -> int:
    """The first token with text behind `border`, or of none that stands there. starts: ends with the text's length."""
    pairs = zip(starts, starts[1:], strict=False)
    return next((number for number, (start, end) in enumerate(pairs) if start >= border or end > border), len(starts))


def _arguments(arguments: Any) -> list[tuple[str, str]]:
    if not isinstance(arguments, dict):
        return [] if arguments is None else [("", shown_value(arguments))]
    return [(visible(name), shown_value(value)) for name, value in arguments.items()]


def _records(calls: Sequence[ToolCall], left: list[Call]) -> list[Call]:
    """What came of a message's calls; taken from `left`, all or none."""
    same = len(left) >= len(calls) and all(_is_of(record, call) for record, call in zip(left, calls, strict=False))
    found = left[: len(calls)] if same else []
    del left[: len(found)]
    return found


def _is_of(record: Call, call: ToolCall) -> bool:
    same = record.arguments is None or as_json(record.arguments) == as_json(call.arguments)  # None: they were no JSON
    return same and record.name == call.name[:LONGEST_NAME]


def _read(records: Sequence[Call]) -> str:
    """What the model reads of results, see data/chat.py."""
    return RESULTS + "".join(RESULT + record.result + END_RESULT for record in records) + END_RESULTS + THINK


def _inside(entry: Between) -> str:
    """A single result without its frame; anything else whole."""
    before, after = RESULTS + RESULT, END_RESULT + END_RESULTS + THINK
    framed = entry.text.startswith(before) and entry.text.endswith(after)
    return visible(entry.text[len(before) : -len(after)] if framed else entry.text)


def _result(record: Call, unread: bool = False) -> Part:
    told: Part = {"kind": "result", "name": visible(record.name), "text": visible(record.result)}
    told |= {"error": record.error, "seconds": record.seconds, "ended": record.ended}
    return told | {"unread": unread and not record.ended}


def _anew(entry: Between) -> Part:
    return {"kind": "anew", "text": visible(entry.text), "size": len(entry.text)}


def _untold(calls: Sequence[Call]) -> list[Part]:
    """Calls that the text does not have, each with its result."""
    parts: list[Part] = []
    for record in calls:
        told = {"name": visible(record.name), "arguments": _arguments(record.arguments)}
        parts += [{"kind": "call", "calls": [told], "reason": None}, _result(record)]
    return parts
