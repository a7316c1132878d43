"""What holds for every environment: problems are functions of their number, keys do not cross the split, the scripted
solution passes the verifier, nothing and nonsense do not, and no answer raises."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conf.errors import UserError
from data.split import is_heldout
from rl.env.environment import Environment, EnvProblem
from rl.env.registry import ENVIRONMENTS, choose
from rl.env.traces import play

LEVELS = [(name, level) for name, one in ENVIRONMENTS.items() for level in range(1, one.max_level + 1)]
HOSTILE = {
    "nothing": "",
    "spaces": " \n\t",
    "lone surrogate": "\ud800",
    "surrogates in a block": "```python\nprint('\udfff')\n```",
    "null": "\0",
    "null in a block": "```python\nprint(1)\0\n```",
    "10 MB": "9" * 10_000_000,
    "10 MB of fences": "```python\n" * 1_000_000,
    "unicode digits": "٣٤٧",
    "json": '{"answer": 1}',
    "right to left": "\u202e12\u202c",
}


def problems(name: str, level: int, num: int, split: str = "train", seed: int = 0) -> list[EnvProblem]:
    return [ENVIRONMENTS[name].problem_at(index, split, seed, level, 0.1) for index in range(num)]


async def verdict(environment: Environment, problem: EnvProblem, answer: str) -> float:
    return await environment.verify(problem, answer, environment.tools(problem))


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_a_problem_is_a_function_of_its_number_and_lies_in_its_split(name: str, level: int) -> None:
    environment = ENVIRONMENTS[name]
    backwards = [environment.problem_at(index, "train", 3, level, 0.1) for index in reversed(range(60))]
    assert backwards[::-1] == problems(name, level, 60, seed=3) != problems(name, level, 60, seed=4)
    held = problems(name, level, 60, "heldout", 3)
    assert not any(is_heldout(problem.key, 0.1) for problem in backwards)
    assert all(is_heldout(problem.key, 0.1) for problem in held)
    assert not {problem.key for problem in backwards} & {problem.key for problem in held}
    assert len({problem.prompt for problem in held}) > 5


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_the_scripted_solution_is_right_and_doing_nothing_is_not(name: str, level: int) -> None:
    environment = ENVIRONMENTS[name]

    async def check() -> None:
        for number, problem in enumerate(problems(name, level, 120) + problems(name, level, 30, "heldout")):
            trace = await play(environment, problem, random.Random(number) if number % 4 == 0 else None)
            assert trace.verdict == 1.0, (problem, trace.messages)
            assert await verdict(environment, problem, "") == 0.0

    asyncio.run(check())


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_another_problems_solution_is_wrong(name: str, level: int) -> None:
    environment = ENVIRONMENTS[name]
    first, second = [problem for problem in problems(name, level, 2)]

    async def check() -> None:
        last = (await play(environment, second)).messages[-1]["content"]
        assert await verdict(environment, first, last) == 0.0

    assert first.prompt != second.prompt
    asyncio.run(check())


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_hostile_answers_are_wrong_and_never_raise(name: str, text: str) -> None:
    assert asyncio.run(verdict(ENVIRONMENTS[name], problems(name, 1, 1)[0], text)) == 0.0


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=()), max_size=60), name=st.sampled_from(["calculator", "search"]))
def test_no_text_breaks_a_verifier(name: str, text: str) -> None:
    assert asyncio.run(verdict(ENVIRONMENTS[name], problems(name, 1, 1)[0], text)) == 0.0


def test_a_share_of_nothing_is_the_users_mistake() -> None:
    for name in ("calculator", "search"):
        with pytest.raises(UserError, match=f"leaves no {name}:1 in the heldout split"):
            ENVIRONMENTS[name].problem_at(0, "heldout", 0, 1, 0.0)


def test_environments_are_chosen_by_name_and_level() -> None:
    assert choose("tickets:4") == (ENVIRONMENTS["tickets"], 4)
    assert choose("search") == (ENVIRONMENTS["search"], 1)
    mistakes = {
        "serch:2": "'serch' is not known: did you mean search?",
        "": "'' is not known: valid: calculator, search, programs, tickets, verifiers",
        "search:4": "search:4 has no such level: search has 1 to 3",
        "search:0": "has 1 to 3",
        "search:": "has 1 to 3",
        "search:-1": "has 1 to 3",
        "search:2:1": "has 1 to 3",
        "search:²": "has 1 to 3",
        "tickets:" + "9" * 5000: "has 1 to 4",
        "verifiers": "names no taskset",
    }
    for chosen, reason in mistakes.items():
        with pytest.raises(UserError) as raised:
            choose(chosen)
        assert reason in str(raised.value) and "\n" not in str(raised.value)
