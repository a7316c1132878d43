"""Grades attempts by rules in processes that can be killed: model output is hostile, and a symbolic comparison may
never end.

A grade past its deadline gets its worker killed; a grader that raises, dies or returns no finite number is a failure
too. A failure is reported as such and never as reward 0: the loop drops the group and counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rl.rewards.attempt import Attempt
from rl.rewards.processes import WorkerPool


@dataclass(frozen=True)
class Grade:
    """Raw parts by name, or None and why there are none."""

    parts: dict[str, float] | None
    error: str | None = None


class RewardPool(WorkerPool):
    """`workers` processes that serve `grade`; a context manager.

    timeout_s: seconds a grade may take; registry: `module:NAME` of a dict name -> grader, imported by the workers.
    """

    def __init__(self, workers: int, timeout_s: float, registry: str = "rl.rewards.rules:REWARDS") -> None:
        self.timeout_s = timeout_s
        super().__init__(["rl.rewards.worker", registry], workers)

    def grade(self, attempts: Sequence[Attempt], parts: Sequence[Sequence[str]]) -> list[Grade]:
        """One grade an attempt, of the parts that are asked of it, in their order. Raises RuntimeError where a worker
        cannot even start."""
        jobs = [
            {"parts": list(names), "attempt": asdict(attempt)} for attempt, names in zip(attempts, parts, strict=True)
        ]
        answers = self.run(jobs, [self.timeout_s] * len(jobs))
        return [Grade(answer.get("parts"), answer.get("error")) for answer in answers]
