"""Counting a letter: `count b: a b c b` -> `2`, worked letter by letter with the count so far: `a0 b1 c1 b2`.

Level n has 2n + 2 letters out of a to f; they stand apart, so that a tokenizer keeps them. The key is the letter asked
for and the multiset: another order of the same letters is the same problem.
"""

from __future__ import annotations

import random
import re

from data.tasks.task import MAX_PROMPT, Problem, Task, drawn

LETTERS = "abcdef"
_PROMPT = re.compile(r"count ([a-z]):((?: [a-z])+)", re.ASCII)


def make_problem(letter: str, text: str) -> Problem:
    """`text`: the letters without spaces."""
    count, steps = 0, []
    for each in text:
        count += each == letter
        steps.append(f"{each}{count}")
    return Problem(_key(letter, text), f"count {letter}: {' '.join(text)}", str(count), " ".join(steps))


def _key(letter: str, text: str) -> str:
    return f"count:{letter}:{''.join(sorted(text))}"


def prompt_key(prompt: str) -> str | None:
    found = _PROMPT.fullmatch(prompt.strip()) if len(prompt) <= MAX_PROMPT else None
    return None if found is None else _key(found[1], found[2].replace(" ", ""))


def _make(rng: random.Random, level: int) -> Problem:
    text = "".join(rng.choice(LETTERS) for _ in range(2 * level + 2))
    return make_problem(rng.choice(text + LETTERS), text)  # rather one that occurs often


TASK = Task("counting", drawn("counting", _make), prompt_key)
