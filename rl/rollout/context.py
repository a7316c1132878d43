"""What becomes of a context that is nearly full (DeepSeek-V3.2, sec. 4.4: search agents past 80% of the window).

Strategies on the messages of a conversation, whose last ones are a question and the calls and results since:

    discard_75   leaves out the first 75% of the calls since the question, with their results
    discard_all  leaves out all of them
    summary      asks for a summary, and starts again with the question and what it says

The paper does it at test time; here the policy is trained under it as well, each new context a row of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from data.context import ASKING, last_of

Messages = list[dict[str, Any]]

DISCARDED = {"discard_75": 0.75, "discard_all": 1.0}
SUMMARY_REQUEST = (
    "The context is nearly full. Write down for yourself, without calling a tool, what you have found out so far and"
    " what is still to be done. You will go on with the question and with what you write now alone."
)
SUMMARY_HEAD = "\n\nWhat you have found out so far:\n"


def since_question(messages: Sequence[dict[str, Any]]) -> tuple[Messages, list[Messages]]:
    """-> (all up to the last question, what came since as groups of a message of the assistant and its results)."""
    start = last_of(messages, ASKING) + 1
    groups: list[Messages] = []
    for message in messages[start:]:
        if message["role"] == "assistant":
            groups.append([message])
        else:
            groups[-1].append(message)
    return list(messages[:start]), groups


def discarded(messages: Sequence[dict[str, Any]], share: float) -> Messages:
    """Without the first `share` of the groups since the question, rounded up."""
    head, groups = since_question(messages)
    kept = groups[math.ceil(share * len(groups)) :]
    return head + [message for group in kept for message in group]


def with_summary(messages: Sequence[dict[str, Any]], summary: str) -> Messages:
    """The conversation up to its last question, which says what was found out; an earlier summary gives way."""
    head, _ = since_question(messages)
    question = head[-1]
    asked = question["content"].partition(SUMMARY_HEAD)[0]
    return [*head[:-1], question | {"content": asked + SUMMARY_HEAD + summary}]
