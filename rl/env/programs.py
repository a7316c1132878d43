"""Small programs with hidden tests; `python` to try them.

    1  one family with a parameter: "Print the sum of those that 3 divides."
    2  two steps on a list, then what to print;     3  four steps

The answer is the program's source, alone or in a fenced block (the last one counts). It reads standard input; the tests
run it in a fresh process of the sandbox each, which is given a test's input and never what is expected, and compare
what it prints line by line; it must end with status 0.

Whoever opens a run sets `pool`, a rl.sandbox.SandboxPool, on the environment; nothing else needs it.
"""

from __future__ import annotations

import inspect
import json
import random
import re
from collections.abc import Sequence
from typing import Any

from data.calls import ToolCall
from rl.env.drawn import draw
from rl.env.environment import Environment, EnvProblem, Said, Solution
from rl.env.program_families import FAMILIES, FOLDS, STEPS, Family
from rl.tools.tool import Tool

NUM_TESTS = 8
TIMEOUT_S = 5.0  # of one test
MAX_ANSWER = 20_000  # characters of an answer that is looked at
READS = {
    "numbers": ("Read integers from one line.", "[int(word) for word in {}.split()]"),
    "line": ("Read one line.", "{}.strip()"),
}
STEPS_OF = {2: 2, 3: 4}  # level -> steps before the last
LIST_SIZE = 6  # least numbers in an input of levels 2 and 3
_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_ANNOTATED, _RETURNS = re.compile(r"(\w+): (?:Ints|int|str)(?=[,)])"), re.compile(r" -> \w+:")
THOUGHTS = ("Write it as functions and try the example.", "I write it and try it on the example.", "Try the example.")
GOOD = ("It prints {} as it should.", "{}, as in the example; done.")


def program_of(answer: str) -> str:
    """The source in an answer: its last fenced block, or all of it. "": none that can be run."""
    if len(answer) > MAX_ANSWER:
        return ""
    source = ([*_FENCED.findall(answer)] or [answer])[-1].strip()
    try:
        source.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate is no source
        return ""
    return "" if "\0" in source else source


def _run(chain: Sequence[tuple[Family, int]], text: str) -> str:
    value: Any = [int(word) for word in text.split()] if chain[0][0].reads == "numbers" else text
    for family, k in chain:
        value = family.run(value, k)
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _source(chain: Sequence[tuple[Family, int]]) -> tuple[str, str]:
    """(the functions, the line that prints what is right for the text `{}`)."""
    functions = {family.run.__name__: inspect.getsource(family.run).strip() for family, _ in chain}
    expression = READS[chain[0][0].reads][1]
    for family, k in chain:
        expression = f"{family.run.__name__}({expression}, {k})"
    source = _RETURNS.sub(":", _ANNOTATED.sub(r"\1", "\n\n\n".join(functions.values())))
    star = "*" if inspect.signature(chain[-1][0].run).return_annotation == "Ints" else ""
    return source, f"print({star}{expression})"


def _make(rng: random.Random, level: int) -> EnvProblem | None:
    if level == 1:
        families: list[Family] = [rng.choice(FAMILIES)]
    else:
        families = [*rng.sample(STEPS, STEPS_OF[level]), rng.choice(FOLDS)]
    chain = [(family, rng.choice(family.parameters)) for family in families]
    said = [family.statement.format(k=k) for family, k in chain]
    task = said[0] if level == 1 else f"In turn (no remainder is negative): {'; '.join(said)}."
    size = chain[0][1] if level == 1 else LIST_SIZE
    inputs = [families[0].inputs(rng, size) for _ in range(NUM_TESTS + 1)]
    example, *tests = [(text, _run(chain, text)) for text in inputs]
    outputs = {output for _, output in tests}
    if len(outputs) < NUM_TESTS // 2 or example in tests:
        return None  # no program may pass by always printing the same
    if not example[1] or any(not output.strip() for output in outputs):
        return None
    prompt = f"{READS[families[0].reads][0]} {task} Example: {example[0]} gives {example[1]}. Answer with a program."
    functions, line = _source(chain)
    state = {"tests": tests, "example": example, "functions": functions, "line": line}
    key = f"programs:{'/'.join(f'{family.run.__name__}:{k}' for family, k in chain)}"
    return EnvProblem(prompt, "", key, json.dumps(state))


class ProgramsEnvironment(Environment):
    """all_or_nothing: 1 where every test passes, else 0; otherwise the share that passes."""

    name = "programs"
    max_level = 3
    wants_pool = True

    def __init__(self, all_or_nothing: bool = True) -> None:
        self.all_or_nothing = all_or_nothing

    def problem_at(self, index: int, split: str, seed: int, level: int, share: float) -> EnvProblem:
        return draw(self.name, _make, index, split, seed, level, share)

    def tools(self, problem: EnvProblem) -> list[Tool]:
        from rl.tools.python import PythonTool
        from rl.tools.submit import Submit

        return [PythonTool(self.pool, *self.python_limits), Submit()]

    async def verify(self, problem: EnvProblem, answer: str, tools: Sequence[Tool]) -> float:
        from rl.sandbox import run_program

        source = program_of(answer)
        if not source:
            return 0.0
        assert self.pool is not None, "whoever opens a run sets the environment's pool"
        tests = json.loads(problem.state)["tests"]
        passed = 0
        for text, expected in tests:
            ran = await run_program(self.pool, source, f"{text}\n", TIMEOUT_S)
            good = ran.error is None and not ran.timed_out and _lines(ran.output) == _lines(expected)
            if not good and self.all_or_nothing:
                return 0.0
            passed += good
        return passed / len(tests)

    def solve(self, problem: EnvProblem) -> Solution:
        """Tries the reference on the example, then answers with it."""
        rng = random.Random(problem.prompt)
        state = json.loads(problem.state)
        text, expected = state["example"]
        tried = f"{state['functions']}\n\n\n{state['line'].format(repr(text))}"
        results = yield Said(rng.choice(THOUGHTS), calls=(ToolCall("python", {"code": tried}),))
        if expected not in results[0]:
            return Said("It does not print what it should.")
        program = f"import sys\n\n\n{state['functions']}\n\n\n{state['line'].format('sys.stdin.read()')}"
        return Said(rng.choice(GOOD).format(expected), f"```python\n{program}\n```")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
