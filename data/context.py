"""Which reasoning stays in the context of a later request: the rule of DeepSeek-V3.2, and others to compare it with.

A new message may only take reasoning away, and then everything behind it has other ids: a rollout goes on token by
token until a message whose role is in `forks_at` arrives, and starts a new row of training there. Calls and results
stay under every rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
ASKING = ("user", "developer")


@dataclass(frozen=True)
class ContextRule:
    """`kept`: messages -> the numbers of those of the assistant whose reasoning is shown."""

    name: str
    kept: Callable[[Sequence[Message]], frozenset[int]]
    forks_at: frozenset[str]


def last_of(messages: Sequence[Message], roles: Sequence[str]) -> int:
    """The number of the last message of one of these roles; -1 where there is none."""
    return next((i for i in reversed(range(len(messages))) if messages[i]["role"] in roles), -1)


def _assistant(messages: Sequence[Message], after: int) -> frozenset[int]:
    return frozenset(i for i in range(after + 1, len(messages)) if messages[i]["role"] == "assistant")


def _since_question(messages: Sequence[Message]) -> frozenset[int]:
    return _assistant(messages, last_of(messages, ASKING))


def _with_calls(messages: Sequence[Message]) -> frozenset[int]:
    return frozenset(i for i in _assistant(messages, -1) if messages[i].get("tool_calls")) | _since_question(messages)


V3_2 = ContextRule("v3_2", _since_question, frozenset(ASKING))  # inside a user turn, results included (sec. 3.2.1)
KEEP_ALL = ContextRule("keep", lambda messages: _assistant(messages, -1), frozenset())
V4 = ContextRule("v4", _with_calls, frozenset(ASKING))  # and for good where the message calls a tool
DROP_AT_RESULTS = ContextRule(  # what V3.2 does away with: every result costs the reasoning that led to its call
    "drop", lambda messages: _assistant(messages, last_of(messages, (*ASKING, "tool"))), frozenset((*ASKING, "tool"))
)
CONTEXT_RULES = {rule.name: rule for rule in (V3_2, KEEP_ALL, V4, DROP_AT_RESULTS)}
