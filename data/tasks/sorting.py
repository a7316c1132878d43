"""Sorting numbers below 100: `sort 7,2,9` -> `2,7,9`, worked by taking the smallest of what is left.

Level n sorts n + 2 numbers. The key is the multiset: a held-out one occurs in training in no order.
"""

from __future__ import annotations

import random
import re

from data.tasks.task import MAX_PROMPT, Problem, Task, drawn

LARGEST = 99
_PROMPT = re.compile(r"sort ([0-9]{1,4}(?:,[0-9]{1,4})*)", re.ASCII)


def make_problem(numbers: list[int]) -> Problem:
    """`7,2,9` -> working `7,2,9>2 7,9>7 9>9`."""
    left, steps = list(numbers), []
    while left:
        least = min(left)
        steps.append(f"{_listed(left)}>{least}")
        left.remove(least)
    prompt = f"sort {_listed(numbers)}"
    return Problem(_key(numbers), prompt, _listed(sorted(numbers)), " ".join(steps))


def _listed(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))


def _key(numbers: list[int]) -> str:
    return f"sort:{_listed(sorted(numbers))}"


def prompt_key(prompt: str) -> str | None:
    found = _PROMPT.fullmatch(prompt.strip()) if len(prompt) <= MAX_PROMPT else None
    return None if found is None else _key([int(number) for number in found[1].split(",")])


def grade(answer_text: str, answer: str, prompt: str) -> float:
    """1.0 for the same numbers in the same order, whether commas, spaces or both stand between them."""
    if len(answer_text) > 2 * len(answer) + 100:
        return 0.0
    return float(answer_text.replace(",", " ").split() == answer.replace(",", " ").split())


def _make(rng: random.Random, level: int) -> Problem:
    return make_problem([rng.randint(0, LARGEST) for _ in range(level + 2)])


TASK = Task("sorting", drawn("sorting", _make), prompt_key, grade)
