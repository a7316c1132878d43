"""Multi-step word problems: a number of things that grows and shrinks, worked a step at a time.

    Ann has 12 pens. Ann gets 3 more. Ann loses 5. How many pens?       12+3=15,15-5=10       10

Level n has n steps: adding and taking away from level 1, doubling and tripling from level 2. Nothing falls below 0 or
rises above 20 (99 at level 3, 999 from level 4): a tiny model can learn the few sums up to 20, so that its working is
mostly right while an answer at once is not. The key is the chain of numbers and operations: other people, things and
verbs are the same problem.
"""

from __future__ import annotations

import random
import re

from data.tasks.task import MAX_PROMPT, Problem, Task, drawn

NAMES = ("Ann", "Ben", "Eva", "Max")
THINGS = ("pens", "eggs", "cups", "nuts")
VERBS = {"+": ("gets {} more", "finds {} more"), "-": ("loses {}", "sells {}"), "*": ("then has {} times as many",)}
Step = tuple[str, int]  # operation and operand
_START = re.compile(r"([A-Z][a-z]+) has ([0-9]{1,6}) ([a-z]+)", re.ASCII)
_STEPS = {
    re.compile(rf"[A-Z][a-z]+ {verb.format('([0-9]{1,6})')}", re.ASCII): operation
    for operation, verbs in VERBS.items()
    for verb in verbs
}


def make_problem(start: int, steps: list[Step], name: str, things: str, verbs: list[str]) -> Problem:
    """`verbs`: one of VERBS for each step."""
    total, worked = start, []
    sentences = [f"{name} has {start} {things}."]
    for (operation, operand), verb in zip(steps, verbs, strict=True):
        after = apply(total, operation, operand)
        worked.append(f"{total}{operation}{operand}={after}")
        sentences.append(f"{name} {verb.format(operand)}.")
        total = after
    sentences.append(f"How many {things}?")
    return Problem(_key(start, steps), " ".join(sentences), str(total), ",".join(worked))


def apply(total: int, operation: str, operand: int) -> int:
    return {"+": total + operand, "-": total - operand, "*": total * operand}[operation]


def _key(start: int, steps: list[Step]) -> str:
    return f"words:{start}{''.join(f'{operation}{operand}' for operation, operand in steps)}"


def prompt_key(prompt: str) -> str | None:
    if len(prompt) > MAX_PROMPT:
        return None
    first, *between, last = prompt.strip().split(". ") if ". " in prompt else (prompt, "")
    start = _START.fullmatch(first)
    if start is None or re.fullmatch(r"How many [a-z]+\?", last, re.ASCII) is None:
        return None
    steps: list[Step] = []
    for sentence in between:
        step = next(((found, op) for form, op in _STEPS.items() if (found := form.fullmatch(sentence))), None)
        if step is None:
            return None
        steps.append((step[1], int(step[0][1])))
    return _key(int(start[2]), steps)


def _make(rng: random.Random, level: int) -> Problem | None:
    most = {1: 20, 2: 20, 3: 99}.get(level, 999)
    start = total = rng.randint(2, min(most, 99))
    steps: list[Step] = []
    for _ in range(level):
        operation = rng.choice("+-" if level == 1 else "++--*")
        operand = rng.randint(2, 3) if operation == "*" else rng.randint(1, 9 if level < 3 else 20)
        total = apply(total, operation, operand)
        if not 0 <= total <= most:
            return None
        steps.append((operation, operand))
    verbs = [rng.choice(VERBS[operation]) for operation, _ in steps]
    return make_problem(start, steps, rng.choice(NAMES), rng.choice(THINGS), verbs)


TASK = Task("words", drawn("words", _make), prompt_key)
