"""1 where math-verify takes the answer and the reference for the same mathematical object (`1/2`, `0.5`,
`\\frac{1}{2}`).

An answer that cannot be read is wrong; a *reference* that cannot be read is the task's fault and raises, so that it
counts as a failed grade. math-verify's own deadlines lean on signal.alarm and are off: the pool kills a grade that
takes too long.
"""

from __future__ import annotations

from math_verify import parse, verify

from rl.rewards.attempt import Attempt, extract_answer


def math_equal(attempt: Attempt) -> float:
    """Raises ValueError for a reference answer that holds no mathematics."""
    reference = parse(attempt.answer, parsing_timeout=None)
    if not reference:
        raise ValueError(f"the reference answer {attempt.answer!r} is not readable as mathematics")
    answer = extract_answer(attempt.text)
    if answer is None or not attempt.finished:
        return 0.0
    parsed = parse(answer, parsing_timeout=None)
    return float(bool(parsed) and verify(reference, parsed, timeout_seconds=None, raise_on_error=True))
