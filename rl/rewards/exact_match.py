"""1 where the answer is the reference, letter by letter."""

from __future__ import annotations

from rl.rewards.attempt import Attempt, extract_answer


def exact_match(attempt: Attempt) -> float:
    """An answer that was cut off is no answer, even where its beginning agrees."""
    return float(attempt.finished and extract_answer(attempt.text) == attempt.answer.strip())
