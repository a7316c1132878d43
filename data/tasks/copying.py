"""Copying: `say 47*82 Nelo` -> `47*82 Nelo`, worked by saying it once before.

Level n has n things, each a number, two of them with a sign between, or an invented name. No task for a good model, but
the quickest way to one: copying out of the context (induction, arXiv 2209.11895) is the step that a small model is
slowest to find in ordinary text, where few tokens ask for it, and every other use of a context waits for it.
"""

from __future__ import annotations

import random
import re

from data.tasks.task import MAX_PROMPT, Problem, Task, drawn

SYLLABLES = tuple(a + b for a in "bdklmnrst" for b in "aeo")
_THING = "[0-9]{1,4}|[0-9]{1,4}[*+-][0-9]{1,4}|[A-Z][a-z]{3,5}"
_PROMPT = re.compile(rf"say ((?:{_THING})(?: (?:{_THING}))*)", re.ASCII)


def make_problem(said: str) -> Problem:
    return Problem(f"say:{said}", f"say {said}", said, said)


def prompt_key(prompt: str) -> str | None:
    found = _PROMPT.fullmatch(prompt.strip()) if len(prompt) <= MAX_PROMPT else None
    return None if found is None else f"say:{found[1]}"


def _thing(rng: random.Random) -> str:
    kind = rng.randrange(3)
    if kind == 0:
        return str(rng.randint(10, 9999))
    if kind == 1:
        return f"{rng.randint(10, 999)}{rng.choice('*+-')}{rng.randint(10, 999)}"
    return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))).capitalize()


def _make(rng: random.Random, level: int) -> Problem:
    return make_problem(" ".join(_thing(rng) for _ in range(level)))


TASK = Task("copying", drawn("copying", _make), prompt_key)
