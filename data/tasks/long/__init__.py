"""Long-context tasks with known answers at any length: one small file a family, after RULER (arXiv 2404.06654).

A run names them as `TASK` or `TASK:LEVEL` (`data.long_tasks=needle,kv:2`); conf/schema.py holds the names and the
highest levels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from data.tasks.long.common import COMMON
from data.tasks.long.copying import COPY, REPEAT
from data.tasks.long.hops import HOPS
from data.tasks.long.long_task import Ask, LongProblem, LongTask, Question
from data.tasks.long.needle import NEEDLE, QUERIES, VALUES
from data.tasks.long.recall import KV
from data.tasks.long.variables import VARIABLES
from data.tasks.long.vocabulary import NAMES
from data.tasks.long.vocabulary import VALUES as VALUE_WORDS

__all__ = ["LONG_TASKS", "LongProblem", "LongTask", "Question", "choose_long", "problem_at", "sample_texts"]

SAMPLE = 400  # problems in a tokenizer's corpus
SAID = 400  # times that every word stands there besides: as often as in text, so that it becomes one token
LONG_TASKS: dict[str, LongTask] = {
    task.name: task for task in (NEEDLE, QUERIES, VALUES, KV, VARIABLES, COMMON, HOPS, COPY, REPEAT)
}


def choose_long(name: str) -> tuple[LongTask, int]:
    """What a run names (checked by conf/validate_long.py) -> task, level."""
    task, _, level = name.partition(":")
    return LONG_TASKS[task], int(level) if level else LONG_TASKS[task].level


def problem_at(
    name: str,
    index: str | int,
    split: str,
    seed: int,
    length: int,
    depth: float | None,
    count: Callable[[str], int],
    *,
    questions: int = 1,
    share: float = 0.1,
) -> LongProblem:
    """Problem `index` of a task (`TASK` or `TASK:LEVEL`), from a hash of the arguments alone.

    length: tokens of context, questions and answers at most; depth: 0 to 1, None: anywhere; `count`: tokens of a text;
    questions: at most, of one context; share: data.heldout. UserError where it does not fit or the split is empty.
    """
    task, level = choose_long(name)
    rng = random.Random(f"long/{name}/{split}/{seed}/{length}/{depth}/{questions}/{index}")
    return task.make(Ask(rng, length, depth, count, level, questions, split, share))


def sample_texts(names: Sequence[str], seed: int, share: float) -> list[str]:
    """Training problems of some tasks as whole texts, for a tokenizer that shall know their words."""
    found = []
    for index in range(SAMPLE):
        name = names[index % len(names)]
        problem = problem_at(name, index, "train", seed, 2000, None, len, questions=4, share=share)
        found.append("".join([*problem.context, *(each.prompt + each.answer for each in problem.questions)]))
    return [*found, *[f" {' '.join([*NAMES, *VALUE_WORDS])}"] * SAID]
