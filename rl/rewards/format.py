"""1 where the sample is one closed thought followed by an answer (DeepSeek-R1's format reward)."""

from __future__ import annotations

from rl.rewards.attempt import THINK_END, Attempt, extract_answer


def well_formed(attempt: Attempt) -> float:
    """Exactly one `</think>`, no second `<think>`, a non-empty answer, and an end of its own."""
    once = attempt.text.count(THINK_END) == 1 and "<think>" not in attempt.text
    return float(attempt.finished and once and bool(extract_answer(attempt.text)))
