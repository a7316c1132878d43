"""Tasks that generate their own problems, worked solutions included, and grade an answer: one file a task.

A run names them as `TASK` or `TASK:LEVEL` (`rl.tasks=words:2,countdown`); several are mixed in equal shares, and one
that is named twice counts twice. conf/schema.py holds the names and the hardest levels, since what is checked before a
run starts knows no data.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from data.tasks import arithmetic, copying, countdown, counting, sorting, words
from data.tasks.task import Problem, Task

__all__ = ["TASKS", "Chosen", "Problem", "Task", "choose", "heldout_problems", "mixed_problems", "task_key"]

RARE = 200  # repetitions in a row
T = TypeVar("T")
MODULES = (arithmetic, words, sorting, countdown, counting, copying)
TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in MODULES}


@dataclass(frozen=True)
class Chosen:
    """A task at a level, as a run names it."""

    task: Task
    level: int


def choose(names: Sequence[str], digits: int) -> list[Chosen]:
    """What a run names (checked by conf/validate.py). Without a level: 1, of arithmetic `digits` digits."""
    found = []
    for name in names:
        task, _, level = name.partition(":")
        default = digits if task == arithmetic.DOMAIN else 1
        found.append(Chosen(TASKS[task], int(level) if level else default))
    return found


def mixed_problems(
    chosen: Sequence[Chosen], split: str, seed: int, share: float, start: int = 0
) -> Iterator[tuple[str, Problem]]:
    """(task's name, problem) from number `start` on, forever; a hash of seed and number picks the task."""
    for index in itertools.count(start):
        noise = hashlib.sha256(f"task/{seed}/{index}".encode()).digest()
        one = chosen[int.from_bytes(noise[:8]) % len(chosen)]
        yield one.task.name, one.task.problem_at(index, split, seed, one.level, share)


def heldout_problems(
    chosen: Sequence[Chosen], seed: int, share: float, limit: int = 4096
) -> Iterator[tuple[str, Problem]]:
    """Distinct held-out problems, see `distinct`."""
    return distinct(mixed_problems(chosen, "heldout", seed, share), lambda item: item[1].key, limit)


def distinct(items: Iterator[T], key: Callable[[T], str], limit: int = 4096) -> Iterator[T]:
    """Each key once, at most `limit`; it ends where new ones have become rare."""
    keys: set[str] = set()
    repeated = 0
    for item in items:
        repeated = repeated + 1 if key(item) in keys else 0
        if repeated > RARE:
            return
        if not repeated:
            keys.add(key(item))
            yield item
            if len(keys) == limit:
                return


def task_key(prompt: str) -> str | None:
    """The key of a prompt that asks for a problem of any task, whoever wrote it; None for any other text."""
    return next((key for task in TASKS.values() if (key := task.prompt_key(prompt)) is not None), None)
