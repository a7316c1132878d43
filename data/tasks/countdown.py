"""Countdown: reach a number from others with + - * / and parentheses, each used at most once.

    make 33 from 5,3,6       5+6=11,11*3=33       (5+6)*3

Level n gives n + 1 numbers from 1 to 20, of which a way to the target (1 to 100) uses all. The key is target and
multiset. Many answers are right, so the grader evaluates what it is given, which is hostile text: a length limit
first, then a parser of its own without recursion, whole numbers from the problem alone, each as often as it is there,
and exact fractions. So no answer can cost more than a few dozen operations on small numbers.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from data.tasks.task import MAX_PROMPT, Problem, Task, drawn

LARGEST, TARGETS = 20, range(1, 101)
MAX_ANSWER = 400  # characters; nobody needs more for the numbers of one problem
MAX_NUMBERS = 16
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_PROMPT = re.compile(r"make ([0-9]{1,6}) from ([0-9]{1,6}(?:,[0-9]{1,6})*)", re.ASCII)
_TOKEN = re.compile(r"[0-9]{1,6}(?![0-9])|[-+*/()]", re.ASCII)


@dataclass(frozen=True)
class Part:
    """A value and how it is written; `strength` is the precedence of its outermost operation, 3 for a number."""

    value: int
    text: str
    strength: int = 3


def make_problem(numbers: list[int], target: int, solution: str, working: str) -> Problem:
    prompt = f"make {target} from {','.join(map(str, numbers))}"
    return Problem(_key(numbers, target), prompt, solution, working)


def _key(numbers: list[int], target: int) -> str:
    return f"countdown:{','.join(map(str, sorted(numbers)))}>{target}"


def parse_prompt(prompt: str) -> tuple[int, list[int]] | None:
    """(target, numbers) of a prompt of this task; None for any other text."""
    found = _PROMPT.fullmatch(prompt.strip()) if len(prompt) <= MAX_PROMPT else None
    if found is None or found[2].count(",") >= MAX_NUMBERS:
        return None
    return int(found[1]), [int(number) for number in found[2].split(",")]


def prompt_key(prompt: str) -> str | None:
    parsed = parse_prompt(prompt)
    return None if parsed is None else _key(parsed[1], parsed[0])


def tokens_of(text: str) -> list[str] | None:
    """ASCII numbers, operators and parentheses; None where anything else but spaces stands in the text."""
    found, at = [], 0
    while at < len(text):
        if text[at] == " ":
            at += 1
            continue
        token = _TOKEN.match(text, at)
        if token is None:
            return None
        found.append(token[0])
        at = token.end()
    return found


def evaluate(text: str, numbers: list[int]) -> Fraction | None:
    """The value of an expression over `numbers`, each used at most once; None for whatever is no such expression.

    Two stacks (Dijkstra's shunting yard): no recursion, so depth costs nothing. A sign before a number is no operator
    here.
    """
    tokens = tokens_of(text) if len(text) <= MAX_ANSWER else None  # so no number of tokens costs much
    if not tokens:
        return None
    if Counter(int(token) for token in tokens if token.isdigit()) - Counter(numbers):
        return None
    values: list[Fraction] = []
    waiting: list[str] = []

    def reduce_top() -> bool:
        operation, right, left = waiting.pop(), values.pop(), values.pop()
        if operation == "/" and right == 0:
            return False
        values.append(_apply(operation, left, right))
        return True

    wants_operand = True
    for token in tokens:
        if wants_operand != (token == "(" or token.isdigit()):
            return None
        if token.isdigit():
            values.append(Fraction(int(token)))
            wants_operand = False
        elif token == "(":
            waiting.append(token)
        elif token == ")":
            while waiting and waiting[-1] != "(":
                if not reduce_top():
                    return None
            if not waiting:
                return None
            waiting.pop()
        else:
            while waiting and waiting[-1] != "(" and PRECEDENCE[waiting[-1]] >= PRECEDENCE[token]:
                if not reduce_top():
                    return None
            waiting.append(token)
            wants_operand = True
    if wants_operand or "(" in waiting:
        return None
    while waiting:
        if not reduce_top():
            return None
    return values[0]


def _apply(operation: str, left: Fraction, right: Fraction) -> Fraction:
    if operation == "+":
        return left + right
    if operation == "-":
        return left - right
    return left * right if operation == "*" else left / right


def grade(answer_text: str, answer: str, prompt: str) -> float:
    """1.0 for any expression over the prompt's numbers that makes its target. ValueError for a prompt of another form;
    `answer`, one solution, is not looked at."""
    parsed = parse_prompt(prompt)
    if parsed is None:
        raise ValueError(f"{prompt[:80]!r} is no countdown problem of the form `make 18 from 5,3,6`")
    target, numbers = parsed
    if len(answer_text) > MAX_ANSWER:
        return 0.0
    return float(evaluate(answer_text.strip(), numbers) == target)


def _make(rng: random.Random, level: int) -> Problem | None:
    """Combines two of the numbers at a time until one is left; None where that is no target."""
    numbers = [rng.randint(1, LARGEST) for _ in range(level + 1)]
    left, steps = [Part(number, str(number)) for number in numbers], []
    while len(left) > 1:
        a, b = (left.pop(rng.randrange(len(left))) for _ in range(2))
        operation = rng.choice("+-*/")
        if operation == "-" and a.value <= b.value or operation == "/" and (b.value < 2 or a.value % b.value):
            return None
        value = int(_apply(operation, Fraction(a.value), Fraction(b.value)))
        steps.append(f"{a.value}{operation}{b.value}={value}")
        text = f"{_wrapped(a, operation, False)}{operation}{_wrapped(b, operation, True)}"
        left.append(Part(value, text, PRECEDENCE[operation]))
    target = left[0].value
    if target not in TARGETS or target in numbers:
        return None
    return make_problem(numbers, target, left[0].text, ",".join(steps))


def _wrapped(part: Part, operation: str, is_right: bool) -> str:
    """The operand as it must be written beside `operation`."""
    needed = PRECEDENCE[operation] + (is_right and operation in "-/")
    return part.text if part.strength >= needed else f"({part.text})"


TASK = Task("countdown", drawn("countdown", _make), prompt_key, grade)
