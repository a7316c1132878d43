"""1 where the grader of the attempt's own task says so; the answer letter by letter where it is of no task.

A prompt that its task cannot read is the row's fault and raises, so that it counts as a failed grade.
"""

from __future__ import annotations

from data.tasks import TASKS
from data.tasks.task import exact
from rl.rewards.attempt import Attempt, extract_answer


def by_task(attempt: Attempt) -> float:
    """An answer that was cut off is no answer, even where its beginning is right."""
    answer = extract_answer(attempt.text)
    if answer is None or not attempt.finished:
        return 0.0
    grade = TASKS[attempt.task].grade if attempt.task else exact
    return grade(answer, attempt.answer.strip(), attempt.prompt)
