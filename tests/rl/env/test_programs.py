"""The programs environment: references by other means, tests that cannot be passed by guessing or read."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from conf.errors import UserError
from rl.env import programs
from rl.env.program_families import FAMILIES, FOLDS, STEPS
from rl.env.programs import STEPS_OF, ProgramsEnvironment, program_of
from rl.env.registry import ENVIRONMENTS
from rl.env.traces import play
from tests.rl.env.local_pool import HAS_SANDBOX, Execution, LocalPool, install, run_here
from tests.rl.env.test_environments import problems, verdict

PROGRAMS = ENVIRONMENTS["programs"]
KNOWN = {  # family -> (input, parameter, what is right), worked out by hand
    "sum_of_multiples": ([3, 4, 9, 10], 3, 12),
    "count_above": ([3, 4, 5], 3, 2),
    "rotate_left": ([1, 2, 3, 4], 5, [2, 3, 4, 1]),
    "every_kth": ([1, 2, 3, 4, 5], 2, [2, 4]),
    "sort_by_remainder": ([5, 3, 4, 1], 3, [3, 1, 4, 5]),
    "pairs_with_sum": ([1, 2, 3, 2], 4, 2),
    "best_window": ([5, 1, 4, 4], 2, 8),
    "chunk_sums": ([1, 2, 3, 4, 5], 2, [3, 7, 5]),
    "digit_sum_in_base": ([5, 0, 255], 2, [2, 0, 8]),
    "powers_modulo": ([2, 3], 5, [3, 2]),
    "shift_letters": ("xyz a", 2, "zab c"),
    "reverse_long_words": ("ab abc", 2, "ab cba"),
    "words_of_length": ("ab cd e", 2, 2),
    "long_runs": ("aabccc", 3, "aabc3"),
    "take_columns": ("abcdef", 3, "adbecf"),
    "keep_multiples": ([2, 3, 4], 2, [2, 4]),
    "drop_multiples": ([2, 3, 4], 2, [3]),
    "add_to_each": ([1, 2], 3, [4, 5]),
    "times_each": ([1, 2], 3, [3, 6]),
    "add_places": ([5, 5], 2, [7, 9]),
    "differences": ([1, 4, 9], 1, [3, 5]),
    "repeat_last": ([1, 2], 2, [1, 2, 2, 2]),
}


def test_every_family_does_what_its_statement_says() -> None:
    assert len(FAMILIES) >= 12
    families = {family.run.__name__: family for family in (*FAMILIES, *STEPS, *FOLDS)}
    assert set(families) == set(KNOWN)
    for name, (value, k, right) in KNOWN.items():
        assert families[name].run(value, k) == right, name
        assert "{k}" in families[name].statement


def test_every_family_is_drawn_and_its_program_prints_the_example() -> None:
    drawn = set()
    for problem in problems("programs", 1, 300) + problems("programs", 2, 100):
        state = json.loads(problem.state)
        text, expected = state["example"]
        assert f"Example: {text} gives {expected}." in problem.prompt and len(problem.prompt) < 700
        program = f"import sys\n{state['functions']}\n{state['line'].format('sys.stdin.read()')}"
        assert run_here(program, f"{text}\n").output == f"{expected}\n"
        drawn |= set(problem.key.removeprefix("programs:").split("/"))
    names = {name.split(":")[0] for name in drawn}
    assert {family.run.__name__ for family in FAMILIES} <= names


@pytest.mark.parametrize("level", [1, 2, 3])
def test_no_program_passes_by_printing_what_is_known(level: int) -> None:
    """Not the example's output, nor the commonest of the hidden ones, nor its own input."""
    for problem in problems("programs", level, 150):
        state = json.loads(problem.state)
        outputs = [output for _, output in state["tests"]]
        guesses = [f"print({state['example'][1]!r})", "print(input())", "print()", "1/0", "import sys; sys.exit(1)"]
        guesses += [f"print({max(outputs, key=outputs.count)!r})"]
        for guess in guesses:
            assert asyncio.run(verdict(PROGRAMS, problem, guess)) == 0.0
        assert [text for text, _ in state["tests"]].count(state["example"][0]) == 0


def test_the_tests_go_in_as_inputs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program is given its own source and a test's input, in a run of its own for each test."""
    seen: list[tuple[str, str]] = []

    async def watched(pool: Any, source: str, stdin: str, timeout_s: float) -> Any:
        seen.append((source, stdin))
        return run_here(source, stdin)

    install(monkeypatch, watched)
    problem = problems("programs", 1, 1)[0]
    state = json.loads(problem.state)
    program = f"import sys\n{state['functions']}\n{state['line'].format('sys.stdin.read()')}"
    assert asyncio.run(verdict(PROGRAMS, problem, program)) == 1.0
    assert seen == [(program, f"{text}\n") for text, _ in state["tests"]] and len(seen) == 8


def test_all_tests_or_their_share(local_pool: LocalPool) -> None:
    problem = problems("programs", 1, 1)[0]
    state = json.loads(problem.state)
    first = state["tests"][0][0]
    program = f"import sys\n{state['functions']}\ntext = sys.stdin.read()\n"
    program += f"if text.strip() == {first!r}: print('no')\nelse: {state['line'].format('text')}"
    shared = ProgramsEnvironment(all_or_nothing=False)
    shared.pool = local_pool
    assert asyncio.run(verdict(PROGRAMS, problem, program)) == 0.0
    assert asyncio.run(verdict(shared, problem, program)) == 7 / 8


def test_the_last_fenced_block_is_the_program() -> None:
    assert program_of("print(1)") == "print(1)"
    assert program_of("So:\n```python\nprint(1)\n```\n") == "print(1)"
    assert program_of("```\nprint(1)\n```\nbetter\n```py\nprint(2)\n```") == "print(2)"
    assert program_of("```python\nprint(1)") == "```python\nprint(1)"  # not closed: no block
    for nothing in ("", "x" * 20_001, "\ud800", "a\0b"):
        assert program_of(nothing) == ""


def test_a_slow_or_failing_program_is_wrong_whatever_it_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems("programs", 1, 1)[0]
    right = {f"{text}\n": output for text, output in json.loads(problem.state)["tests"]}
    ends: list[tuple[dict[str, Any], float]] = [
        ({}, 1.0),
        ({"timed_out": True}, 0.0),
        ({"error": "ValueError: x"}, 0.0),
    ]
    for end, expected in ends:

        async def ran(pool: Any, source: str, stdin: str, timeout_s: float, end: Any = end) -> Execution:
            return Execution(f"{right[stdin]} \n\n", **end)

        install(monkeypatch, ran)
        assert asyncio.run(verdict(PROGRAMS, problem, "print(1)")) == expected


def test_printing_the_input_is_right_in_half_of_the_tests_at_most() -> None:
    for problem in problems("programs", 1, 1000):
        tests = json.loads(problem.state)["tests"]
        assert sum(text == output for text, output in tests) <= len(tests) // 2, problem.prompt


def test_without_a_pool_it_is_our_own_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PROGRAMS, "pool", None)
    with pytest.raises(AssertionError, match="sets the environment's pool"):
        asyncio.run(verdict(PROGRAMS, problems("programs", 1, 1)[0], "print(1)"))


@pytest.mark.skipif(not HAS_SANDBOX, reason="this tree has no rl/sandbox yet")
def test_in_the_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the pool is the real one
    from rl.sandbox import Limits, SandboxPool

    monkeypatch.setattr(programs, "TIMEOUT_S", 1.0)
    environment = ProgramsEnvironment()

    async def check() -> None:
        async with SandboxPool(Limits(), mode="auto") as pool:
            environment.pool = pool
            for problem in problems("programs", 1, 2) + problems("programs", 2, 1):
                trace = await play(environment, problem)
                assert trace.verdict == 1.0, trace.messages
                assert await environment.verify(problem, "while True: pass", []) == 0.0
                assert await environment.verify(problem, "import os\nos.kill(os.getppid(), 9)", []) == 0.0

    try:
        asyncio.run(check())
    except UserError as error:
        pytest.skip(f"no sandbox on this machine: {error}")


def test_levels_ask_for_more() -> None:
    lengths = [sum(len(p.prompt) for p in problems("programs", level, 80)) for level in (2, 3)]
    assert lengths == sorted(lengths)
    assert STEPS_OF == {2: 2, 3: 4}
