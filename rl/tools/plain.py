"""Hostile values made plain: what a policy writes as arguments, what a tool gives back as text.

A parser of model output can hand over any JSON and a little more: nesting that recurses to death, integers that `str`
refuses, NaN, lone surrogates that no UTF-8 file takes. Arguments are refused with a reason, or leave as JSON that any
reader can read; text leaves as UTF-8 can say it, and not too long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 32  # lists and objects in one another
MAX_INT_BITS = 4096  # about 1,200 digits; Python prints none of more than 4,300
MAX_VALUES = 10_000  # in all, of one call


class NotPlain(ValueError):
    """What in the arguments is no JSON that a tool should be given, in words that the model reads."""


def clean(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates as U+FFFD: it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def cut(text: str, limit: int) -> str:
    """At most `limit` characters: the middle of a longer text is left out, and a note says how much."""
    if len(text) <= limit:
        return text
    note = f"\n[... {len(text)} characters in all, the middle is left out ...]\n"
    kept = limit - len(note)
    if kept <= 0:
        return text[:limit]
    head = kept - kept // 2
    return text[:head] + note + text[len(text) - kept // 2 :]


def plain(value: Any) -> Any:
    """A copy of JSON-like `value` with clean strings. Raises NotPlain."""
    left = [MAX_VALUES]

    def copy(value: Any, depth: int) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise NotPlain(f"more than {MAX_VALUES} values")
        if depth > MAX_DEPTH:
            raise NotPlain(f"nested more than {MAX_DEPTH} deep")
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return clean(value)
        if isinstance(value, int):
            if value.bit_length() > MAX_INT_BITS:
                raise NotPlain(f"an integer of more than {MAX_INT_BITS} bits")
            return value
        if isinstance(value, float):
            if not math.isfinite(value):
                raise NotPlain(f"{value} is no JSON number")
            return value
        if isinstance(value, Mapping):
            return {clean(key): copy(inner, depth + 1) for key, inner in value.items() if _is_key(key)}
        if isinstance(value, list | tuple):
            return [copy(inner, depth + 1) for inner in value]
        raise NotPlain(f"a {type(value).__name__} is no JSON value")

    return copy(value, 0)


def _is_key(key: object) -> bool:
    if not isinstance(key, str):
        raise NotPlain(f"an object has a {type(key).__name__} as a key")
    return True
