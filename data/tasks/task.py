"""What every generated task is: problems with random access, each with worked solution and key, and a pure grader.

Problem `index` of (split, seed, level) comes from a hash of these alone, so any process can make any problem without
the ones before it. The key names what must not be seen twice, in whatever order or words it is asked; `data.split`
decides by it, so a held-out key never occurs in training. A key can be read back from a prompt, whoever wrote it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from conf.errors import UserError
from data.split import in_split

MAX_DRAWS = 10_000  # draws for one problem before a split counts as empty
MAX_PROMPT = 4000  # characters of a prompt that a key is read from


@dataclass(frozen=True)
class Problem:
    key: str  # "38+47"
    prompt: str  # "47+38=?"
    answer: str  # "85"
    working: str  # "7+8=15,4+3+1=8"

    def messages(self, worked: bool = True) -> list[dict[str, str]]:
        """The problem as a conversation: the working is the reasoning; not `worked`, the answer comes at once."""
        return [
            {"role": "user", "content": self.prompt},
            {"role": "assistant", "reasoning_content": self.working if worked else "", "content": self.answer},
        ]


def exact(answer_text: str, answer: str, prompt: str) -> float:
    """1.0 for exactly the answer (spaces around it aside), else 0.0."""
    return float(answer_text.strip() == answer)


@dataclass(frozen=True)
class Task:
    """problem_at: (index, split, seed, level, share) -> Problem; prompt_key: the key of a prompt of this task, None for
    any other text; grade: (the model's answer, reference answer, prompt) -> 1.0 or 0.0, ValueError for a prompt that it
    cannot judge."""

    name: str
    problem_at: Callable[[int, str, int, int, float], Problem]
    prompt_key: Callable[[str], str | None]
    grade: Callable[[str, str, str], float] = exact

    def problems(self, split: str, seed: int, level: int, share: float = 0.1, start: int = 0) -> Iterator[Problem]:
        """The problems of a split from number `start` on, forever. `share`: data.heldout."""
        for index in itertools.count(start):
            yield self.problem_at(index, split, seed, level, share)


def drawn(name: str, make: Callable[[random.Random, int], Problem | None]) -> Callable[..., Problem]:
    """A task's `problem_at` from `make`, a draw of one problem of a level (None: draw again).

    UserError where the split has (next to) no problem of that level.
    """

    def problem_at(index: int, split: str, seed: int, level: int, share: float) -> Problem:
        for draw in range(MAX_DRAWS):
            problem = make(random.Random(f"{name}/{split}/{seed}/{level}/{index}/{draw}"), level)
            if problem is not None and in_split(problem.key, split, share):
                return problem
        raise UserError(
            f"data.heldout={share:g} leaves no {name}:{level} in the {split} split: give a share nearer to 0.1"
        )

    return problem_at
