"""The calculator environment: right by other means, one key however it is asked, and nothing to be had by guessing."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import Counter

import pytest

from data.sources import question_key
from rl.env.calculator import _pair, _problem, follow
from rl.env.registry import ENVIRONMENTS
from tests.rl.env.test_environments import problems, verdict

CALCULATOR = ENVIRONMENTS["calculator"]


def by_hand(prompt: str) -> int:
    """The answer from the words alone."""
    if prompt.endswith("=?") and not prompt.startswith("Let"):
        return int(eval(prompt[:-2]))
    numbers = [int(number) for number in re.findall(r"\d+", prompt)]
    if prompt.startswith("Let"):
        found = re.fullmatch(r"Let x=(.*)\. If x is even, y=x(.*), else y=x(.*)\. y=\?", prompt)
        assert found is not None
        x = eval(found[1])
        return int(eval(f"{x}{found[3] if x % 2 else found[2]}"))
    a, b, other, even, odd = numbers
    x = a * b + (other if "more come" in prompt else -other)
    return x * (odd if x % 2 else even)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_answer_is_right_by_the_words_of_the_prompt(level: int) -> None:
    for problem in problems("calculator", level, 300):
        assert int(problem.answer) == by_hand(problem.prompt)
        assert len(problem.prompt) <= 150 and problem.prompt.isascii()


@pytest.mark.parametrize("level", [2, 3])
def test_both_branches_are_taken_and_the_other_one_is_wrong(level: int) -> None:
    parities: Counter[int] = Counter()
    for problem in problems("calculator", level, 200):
        steps = json.loads(problem.state)
        before = follow(steps)[-2]
        parities[before % 2] += 1
        other = str(eval(f"{before}{steps[-1][1 - before % 2]}"))
        assert asyncio.run(verdict(CALCULATOR, problem, other)) == 0.0
    assert min(parities.values()) > 60, parities


def test_no_answer_is_likely_and_no_number_of_the_prompt_is_it() -> None:
    for level in (1, 2, 3):
        found = problems("calculator", level, 500)
        assert max(Counter(problem.answer for problem in found).values()) < 5
        assert not any(problem.answer in re.findall(r"\d+", problem.prompt) for problem in found)


def test_the_answer_is_matched_letter_by_letter() -> None:
    problem = _problem("347*682=?", "k", ["347*682"])
    right = {"236654": 1.0, " 236654\n": 1.0, "236654.": 0.0, "236,654": 0.0, "0236654": 0.0, "y=236654": 0.0}
    assert {text: asyncio.run(verdict(CALCULATOR, problem, text)) for text in right} == right


def test_keys_forget_the_order_of_operands_and_the_words() -> None:
    by_key: dict[str, set[str]] = {}
    for problem in problems("calculator", 1, 2000):
        a, sign, b = re.split(r"([-+*])", problem.prompt[:-2])
        by_key.setdefault(problem.key, set()).add(problem.prompt)
        if sign == "+":
            assert problem.key == question_key(problem.prompt)  # the sum is also a task of data/tasks
        elif sign == "*":
            assert problem.key == f"calculator:{min(int(a), int(b))}*{max(int(a), int(b))}"
        else:
            assert problem.key == f"calculator:{a}-{b}"
    mirrored = [prompts for prompts in by_key.values() if len(prompts) > 1]
    assert all(len(prompts) <= 2 for prompts in mirrored)
    keys = {problem.key for problem in problems("calculator", 3, 50)}
    assert all(re.fullmatch(r"calculator:\d+\*\d+[-+]\d+\?\*\d+:\*\d+", key) for key in keys)


def test_products_are_odd_and_even_when_asked() -> None:
    rng = random.Random(0)
    for parity in (0, 1):
        pairs = [_pair(rng, parity) for _ in range(100)]
        assert all(a * b % 2 == parity and 100 <= min(a, b) and max(a, b) <= 999 for a, b in pairs)
