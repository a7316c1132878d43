"""DSML, the markup in which DeepSeek-V3.2 writes tool calls: calls -> markup, and what a model said -> calls.

    <｜DSML｜function_calls>
    <｜DSML｜invoke name="search">
    <｜DSML｜parameter name="query" string="true">any text</｜DSML｜parameter>
    <｜DSML｜parameter name="num_results" string="false">3</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜function_calls>

A string stands raw between its tags, without escapes, everything else is JSON. So a value with the closing tag in it
cannot be written (the released encoder writes it all the same, and its parser fails): `inexpressible` says so. The
released parser raises on whatever is malformed; `parse_turn` never does. It takes any white space between tags and JSON
in any spacing, and of everything else that is not in the form above it says what is wrong and where.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from data.calls import ToolCall
from data.pieces import Piece
from data.tokenizer import DSML, END_THINK

OPENER = f"<{DSML}function_calls"  # of a block; a message that holds it calls, or tries to
BLOCK, END_BLOCK = f"{OPENER}>", f"</{DSML}function_calls>"
END_INVOKE, END_PARAMETER = f"</{DSML}invoke>", f"</{DSML}parameter>"
_NAME = rf'name="((?:(?!{DSML}).)*?)"'
_INVOKE = re.compile(rf"<{DSML}invoke\s+{_NAME}\s*>", re.DOTALL)
_PARAMETER = re.compile(rf'<{DSML}parameter\s+{_NAME}\s+string="(true|false)"\s*>', re.DOTALL)
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class CallError:
    """`position`: where in the text, in characters. `reason` is one line, written for the model that is to mend it."""

    position: int
    reason: str

    def __str__(self) -> str:
        return f"malformed call at character {self.position}: {self.reason}"


@dataclass(frozen=True)
class Turn:
    """What one message of the assistant says. With an `error` there are no calls, and `content` holds the malformed
    block as it was written."""

    reasoning: str
    content: str
    calls: tuple[ToolCall, ...] = ()
    error: CallError | None = None


# Calls -> markup


def _invoke(name: str) -> tuple[str, str, str]:
    return f'<{DSML}invoke name="', name, '">'


def _parameter(name: str, value: Any) -> tuple[str, str, str]:
    return f'<{DSML}parameter name="', name, f'" string="{str(isinstance(value, str)).lower()}">'


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def call_pieces(calls: Iterable[ToolCall]) -> list[Piece]:
    """The block at the end of a message, with the empty line before it."""
    parts: list[tuple[str, bool]] = [(f"\n\n{BLOCK}\n", True)]
    for call in calls:
        before, name, after = _invoke(call.name)
        parts += [(before, True), (name, False), (after + "\n", True)]
        for number, (key, value) in enumerate(call.arguments.items()):
            before, name, after = _parameter(key, value)
            parts += [("\n" * (number > 0) + before, True), (name, False), (after, True)]
            parts += [(_value(value), False), (END_PARAMETER, True)]
        parts.append((f"\n{END_INVOKE}\n", True))
    parts.append((END_BLOCK, True))
    return [Piece(text, markup, said=True) for text, markup in parts]


def inexpressible(call: ToolCall) -> str | None:
    """Why the call cannot be written so that it is read again as it was; None where it can."""
    tag = "".join(_invoke(call.name))
    if not call.name or not _reads_back(_INVOKE, tag, call.name):
        return f"the name {call.name!r} cannot stand in a tag"
    for key, value in call.arguments.items():
        if not _reads_back(_PARAMETER, "".join(_parameter(key, value)), key):
            return f"the parameter name {key!r} cannot stand in a tag"
        if END_PARAMETER in _value(value):
            return f"parameter {key!r} holds {END_PARAMETER}, which would end it"
    return None


def _reads_back(tag: re.Pattern[str], text: str, name: str) -> bool:
    match = tag.match(text)
    return match is not None and match.end() == len(text) and match.group(1) == name


def calls_of(message: Mapping[str, Any]) -> tuple[ToolCall, ...]:
    """`tool_calls` of a message in the OpenAI form; arguments are an object, or its JSON."""
    calls = []
    for entry in message.get("tool_calls") or ():
        function = entry["function"]
        arguments = function["arguments"]
        calls.append(ToolCall(function["name"], json.loads(arguments) if isinstance(arguments, str) else arguments))
    return tuple(calls)


# What the model said -> calls


class _Malformed(Exception):
    def __init__(self, position: int, reason: str) -> None:
        self.error = CallError(position, reason)


def parse_turn(text: str, thinking: bool = True) -> Turn:
    """What was sampled after its opening `<think>` (or `</think>`), without eos -> what it means; never raises."""
    start = 0
    if thinking:
        end = text.find(END_THINK)
        if end < 0:
            called = text.find(OPENER)
            position, what = (called, "the calls") if called >= 0 else (len(text), "the answer")
            return Turn(text, "", error=CallError(position, f"the thought has no end: write {END_THINK} before {what}"))
        start = end + len(END_THINK)
    reasoning = text[: max(start - len(END_THINK), 0)]
    position = text.find(OPENER, start)
    if position < 0:
        return Turn(reasoning, text[start:])
    try:
        calls = _block(text, position)
    except _Malformed as malformed:
        return Turn(reasoning, text[start:], error=malformed.error)
    content = text[start:position]
    space = next(space for space in ("\n\n", "\n", "") if content.endswith(space))
    return Turn(reasoning, content.removesuffix(space), calls)


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None  # it matches nothing at all, too
    return match.end()


def _block(text: str, position: int) -> tuple[ToolCall, ...]:
    """The calls of the block that opens at `position` and ends the text."""
    if not text.startswith(BLOCK, position):
        raise _Malformed(position, f"a block of calls opens with {BLOCK}")
    calls = []
    position = _skip(text, position + len(BLOCK))
    while not text.startswith(END_BLOCK, position):
        if not text.startswith(f"<{DSML}invoke", position):
            _unexpected(text, position, f'<{DSML}invoke name="NAME">', END_BLOCK, "the block")
        call, position = _call(text, position)
        calls.append(call)
        position = _skip(text, position)
    if not calls:
        raise _Malformed(position, "the block holds no call")
    rest = _skip(text, position + len(END_BLOCK))
    if text.startswith(OPENER, rest):
        raise _Malformed(rest, "a second block: put all calls into one")
    if rest < len(text):
        raise _Malformed(rest, "text after the block: the message ends with its calls")
    return tuple(calls)


def _call(text: str, position: int) -> tuple[ToolCall, int]:
    """The call that opens at `position`, and where the text goes on behind it."""
    tag = _INVOKE.match(text, position)
    if tag is None or not tag.group(1):
        raise _Malformed(position, f'a call opens with <{DSML}invoke name="NAME">, the name in quotes')
    arguments: dict[str, Any] = {}
    position = _skip(text, tag.end())
    while not text.startswith(END_INVOKE, position):
        if not text.startswith(f"<{DSML}parameter", position):
            opening = f'<{DSML}parameter name="NAME" string="true|false">'
            _unexpected(text, position, opening, END_INVOKE, f"the call of {_short(tag.group(1))}")
        parameter = _PARAMETER.match(text, position)
        if parameter is None:
            form = f'<{DSML}parameter name="NAME" string="true"> (or "false")'
            raise _Malformed(position, f"a parameter opens with {form}, the name in quotes")
        key, start = parameter.group(1), parameter.end()
        if key in arguments:
            raise _Malformed(position, f"parameter {_short(key)} is given twice")
        end = text.find(END_PARAMETER, start)
        if end < 0:
            raise _Malformed(position, f"parameter {_short(key)} has no end: close it with {END_PARAMETER}")
        arguments[key] = _read(text[start:end], parameter.group(2) == "true", key, start)
        position = _skip(text, end + len(END_PARAMETER))
    return ToolCall(tag.group(1), arguments), position + len(END_INVOKE)


def _read(value: str, is_string: bool, key: str, position: int) -> Any:
    try:
        read = value if is_string else json.loads(value)
        json.dumps(read, ensure_ascii=False, allow_nan=False).encode()  # no NaN, no infinity, no lone surrogate
    except UnicodeEncodeError:
        raise _Malformed(position, f"parameter {_short(key)} holds half a character") from None
    except (ValueError, RecursionError):
        reason = f'parameter {_short(key)} with string="false" is no JSON: write JSON, or string="true" for plain text'
        raise _Malformed(position, reason) from None
    return read


def _unexpected(text: str, position: int, opening: str, closing: str, what: str) -> NoReturn:
    if position == len(text):
        raise _Malformed(position, f"{what} has no end: close it with {closing}")
    raise _Malformed(position, f"{_short(text[position:])} where {opening} or {closing} belongs")


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")
