"""Arithmetic past what fits in the head, with an exact calculator.

    1  47*82=?  347-682=?                                                      one call
    2  Let x=347*682. If x is even, y=x+5129, else y=x*86. y=?                 two; which one is second, the first tells
    3  A farm has 347 rows of 682 eggs. 5129 more come. If the number is even, each sells for 37, else for 41. How much
       is earned?                                                              three

From level 2 on the next operation depends on whether a result is even, so the solver has to think again after it. (One
call with `%` can spell out both branches; nothing forbids a policy to find that out.)
Prompts are short and regular: a tiny model learns them by copying numbers.

The key is the chain of operations with the operands of a first sum or product in order; things and verbs do not matter.
A sum's key is that of data/tasks/arithmetic, which asks it in the same words.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from data.calls import ToolCall
from data.tasks.arithmetic import pair_key
from rl.env.drawn import draw
from rl.env.environment import Environment, EnvProblem, Said, Solution
from rl.tools.tool import Tool

Step = str | list[str]  # "+5129", or what is done to an even number and to an odd one; the first is "347*682"

PLACES = ("farm", "mill", "shop")
HOLDERS = ("rows", "boxes", "carts")
THINGS = ("eggs", "sacks", "cups")
ASKS = ("{} is too long for the head; ask.", "I need {}.", "{} by the calculator.")
RESUMES = ("it is {0}; now {1}.", "{0}, next {1}.", "so {0}; then {1}.")
BRANCHES = ("it is {0}, {2}, so {1}.", "{0} is {2}: {1}.")
ENDS = ("it is {}; done.", "{} is the answer.")


def follow(steps: Sequence[Step]) -> list[int]:
    """The value after each step."""
    values: list[int] = []
    for step in steps:
        if not values:
            assert isinstance(step, str)
            values.append(_value(step))
        else:
            values.append(_value(f"{values[-1]}{_chosen(step, values[-1])}"))
    return values


def _value(expression: str) -> int:
    """The value of `347*682`; the first number may be negative."""
    place = next(place for place, sign in enumerate(expression) if sign in "+-*" and place)
    left, right = int(expression[:place]), int(expression[place + 1 :])
    return {"+": left + right, "-": left - right, "*": left * right}[expression[place]]


def _chosen(step: Step, value: int) -> str:
    return step if isinstance(step, str) else step[value % 2]


def _pair(rng: random.Random, parity: int) -> tuple[int, int]:
    """Factors whose product is even (parity 0) or odd (1): of any two, three would be even in four."""
    a, b = rng.randint(101, 999), rng.randint(101, 999)
    return (a | 1, b | 1) if parity else (a & ~1, b)


def _make(rng: random.Random, level: int) -> EnvProblem:
    if level == 1:
        sign = rng.choice("**+-")
        least, most = (12, 99) if sign == "*" else (101, 999)
        a, b = rng.randint(least, most), rng.randint(least, most)
        a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
        first = f"{a}{sign}{b}"
        key = pair_key(a, b) if sign == "+" else f"calculator:{_ordered(a, sign, b)}"
        return _problem(f"{first}=?", key, [first])
    a, b = _pair(rng, rng.randint(0, 1))
    first = f"{a}*{b}"
    if level == 2:
        signs = rng.sample("+-*", 2)
        even, odd = (f"{sign}{rng.randint(12, 99) if sign == '*' else rng.randint(1001, 9999)}" for sign in signs)
        prompt = f"Let x={first}. If x is even, y=x{even}, else y=x{odd}. y=?"
        return _problem(prompt, f"calculator:{_ordered(a, '*', b)}?{even}:{odd}", [first, [even, odd]])
    sign, other = rng.choice("+-"), rng.randint(1001, 9999)
    prices = [f"*{price}" for price in rng.sample(range(12, 100), 2)]
    place, holder, thing = rng.choice(PLACES), rng.choice(HOLDERS), rng.choice(THINGS)
    happened = "more come" if sign == "+" else "are lost"
    prompt = (
        f"A {place} has {a} {holder} of {b} {thing}. {other} {happened}. If the number is even, "
        f"each sells for {prices[0][1:]}, else for {prices[1][1:]}. How much is earned?"
    )
    key = f"calculator:{_ordered(a, '*', b)}{sign}{other}?{':'.join(prices)}"
    return _problem(prompt, key, [first, f"{sign}{other}", prices])


def _ordered(a: int, sign: str, b: int) -> str:
    return f"{a}-{b}" if sign == "-" else f"{min(a, b)}{sign}{max(a, b)}"


def _problem(prompt: str, key: str, steps: list[Step]) -> EnvProblem:
    return EnvProblem(prompt, str(follow(steps)[-1]), key, json.dumps(steps))


class CalculatorEnvironment(Environment):
    name = "calculator"
    max_level = 3

    def problem_at(self, index: int, split: str, seed: int, level: int, share: float) -> EnvProblem:
        return draw(self.name, _make, index, split, seed, level, share)

    def tools(self, problem: EnvProblem) -> list[Tool]:
        from rl.tools.calculator import Calculator

        return [Calculator()]

    async def verify(self, problem: EnvProblem, answer: str, tools: Sequence[Tool]) -> float:
        """1.0 for the number, letter by letter (spaces around it aside)."""
        return float(answer.strip() == problem.answer)

    def solve(self, problem: EnvProblem) -> Solution:
        """One call a step; a result that is no number ends it without an answer."""
        rng = random.Random(problem.prompt)
        steps: list[Step] = json.loads(problem.state)
        assert isinstance(steps[0], str)
        expression, thought = steps[0], rng.choice(ASKS).format(steps[0])
        for step in [*steps[1:], ""]:
            results = yield Said(thought, calls=(ToolCall("calculator", {"expression": expression}),))
            result = results[0].strip()
            if not result.removeprefix("-").isdecimal():
                return Said("the calculator gives no number.")
            if step == "":
                return Said(rng.choice(ENDS).format(result), result)
            value = int(result)
            expression = f"{value}{_chosen(step, value)}"
            how = RESUMES if isinstance(step, str) else BRANCHES
            thought = rng.choice(how).format(value, expression, "odd" if value % 2 else "even")
        raise AssertionError("the last step returns")
