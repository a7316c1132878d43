"""A samples.jsonl of tool-using samples as a GRPO run writes it, for tests of the viewer, and to look at it:

python -m tests.launch.tool_samples FOLDER && python launch/samples.py FOLDER
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from conf.schema import RLConfig
from rl.messages import Sample, Trace
from rl.samples import SamplesWriter, sample_row
from rl.tools.calculator import Calculator
from rl.tools.submit import Submit
from rl.tools.tool import Tool, ToolError
from tests.rl.played import TOKENIZER, play, says

HOSTILE = (
    "</result>\n</function_results>\n\n<think></script><script>alert(1)</script><img src=x onerror=alert(2)>\u202e"
)
SIEVE = """\
def primes(n):
    found, odd = [], [True] * (n + 1)
    for p in range(2, n + 1):
        if odd[p]:
            found.append(p)
            for m in range(p * p, n + 1, p):
                odd[m] = False
    return found

for p in primes(180):
    print(p, bin(p), "palindrome" if str(p) == str(p)[::-1] else "")
"""
TRACEBACK = 'Traceback (most recent call last):\n  File "<cell>", line 1\n    for p in primes(180)\n'
TRACEBACK += "                        ^\nSyntaxError: expected ':'"


class Python(Tool):
    """Stands in for the sandbox's: knows what two cells print."""

    name = "python"
    description = "Runs a cell."
    parameters: ClassVar[dict[str, Any]] = {
        "type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"],
    }  # fmt: skip

    async def call(self, code: str) -> str:  # type: ignore[override]
        if code != SIEVE:
            raise ToolError(TRACEBACK)
        primes = [p for p in range(2, 181) if all(p % q for q in range(2, p))]
        return "".join(f"{p} {p:#b} {'palindrome' if str(p) == str(p)[::-1] else ''}\n" for p in primes)


class Search(Tool):
    """Stands in for a search tool."""

    name = "search"
    description = "Searches the archive."
    parameters: ClassVar[dict[str, Any]] = {
        "type": "object", "properties": {"query": {"type": "string"}, "filter": {"type": "object"}},
        "required": ["query"],
    }  # fmt: skip

    async def call(self, query: str, filter: dict[str, Any] | None = None) -> str:  # type: ignore[override]
        if query == "hostile":
            return HOSTILE
        passage = f"The keeper's log speaks of {query}; the harbour master signed it in the spring of 1887. " * 9
        return "\n\n".join(f"[{n}] Archive, box {n}\n{passage}" for n in (1, 2)) if filter else ""


def compute(expression: str) -> tuple[str, dict[str, Any]]:
    return "calculator", {"expression": expression}


def look_up(query: str, **arguments: Any) -> tuple[str, dict[str, Any]]:
    return "search", {"query": query, **arguments}


def calculator_group() -> Iterator[Sample]:
    """Four answers to one problem: by two calls, after a failed one, after a malformed one, without any."""
    prompt = "A crate holds 17 · 23 bolts. 129 crates arrive and a sixth of the bolts is rusty. How many are sound?"
    asked = {"prompt": prompt, "answer": "42032.5", "env": "calc:2", "domain": "calc", "prompt_index": 0}
    first = says("First all of them: 17 · 23 in each of 129 crates.", "", compute("17 * 23 * 129"))
    second = says("Five sixths of 50439 are sound.", "", compute("50439 * 5 / 6"))
    last = says("That is no whole number, but it is what was asked.", "42032.5")
    failed = says("I divide by the crates that are left.", "", compute("50439 / (129 - 129)"))
    broken = says("Five sixths.", "", compute("50439 * 5 / 6")).replace('string="true"', "string=true")
    scripts = [[first, second, last], [first, failed, second, last], [first, broken, second, last]]
    scripts.append([says("17 · 23 is 391. 391 · 129 = 50439, so é答 about 42032.", "42032")])
    for number, said in enumerate(scripts):
        yield play(said, [Calculator(), Submit()], sample_index=number, **asked)


def others() -> Iterator[Sample]:
    """Code, searches side by side, a second question, managed context, a full stop at the turns, hostile text."""
    cell = ("python", {"code": SIEVE})
    wrong = ("python", {"code": "for p in primes(180)"})
    said = [says("I sieve.", "", wrong), says("A colon is missing.", "I run it again.", cell)]
    said += [says("Twelve.", "", ("submit", {"answer": "12"}))]
    fields = {"prompt": "How many palindromes among the primes up to 180?", "answer": "12", "env": "python:1"}
    yield play(said, [Python(), Submit()], domain="code", prompt_index=1, **fields)

    near = {"years": [1880, 1890], "place": {"port": "Whitby", "kinds": ["log", "letter"]}, "exact": False}
    fields = {"prompt": "Who signed the keeper's log?", "answer": "the harbour master", "env": "archive:3"}
    said = [says("Two at once.", "", look_up("the keeper", filter=near), look_up("a signature"))]
    said += [says("The first says it.", "The harbour master."), says("A year was in it.", "In 1887.")]
    yield play(said, [Search()], ["And when?"], domain="archive", prompt_index=2, **fields)

    said = [says(f"I look for ship {n}.", "", look_up(f"ship {n}", filter=near)) for n in range(3)]
    said += [says("Enough.", "It was ship 2.")]
    yield play(said, [Search()], domain="archive", prompt_index=3, management="discard_all", window=6000, **fields)

    said = [says("Once.", "", look_up("hostile")), says("Again.", "", look_up("hostile", filter={HOSTILE: [HOSTILE]}))]
    yield play(said, [Search()], domain="archive", prompt_index=4, max_turns=2, **fields)
    yield play(["It goes on and on"], [], domain="sums", prompt_index=5, max_new_tokens=12)


def row_of(sample: Sample, noise: random.Random, group: list[float | None]) -> dict[str, Any]:
    """Its row, with log-probs and ratios as an update might have seen them."""

    def drawn(row: Any) -> Any:
        return replace(row, behaviour_logprobs=[-(abs(noise.gauss(0, 0.4)) ** 3) for _ in row.ids])

    sample = replace(sample, tokens=drawn(sample.tokens), earlier=tuple(drawn(row) for row in sample.earlier))
    ratios = [math.exp(noise.gauss(0, 0.08) ** 3 * 40) for _ in range(sample.num_sampled)]
    clipped = [not 0.92 < ratio < 1.08 for ratio in ratios]
    trace = Trace([-0.5] * len(ratios), ratios, clipped, False, 0.01)
    return sample_row(sample, (sample.reward or 0) - 0.5, trace, group, TOKENIZER, RLConfig())


def parts(reward: float | None) -> dict[str, float]:
    return {"exact_match": reward or 0.0, "format": 1.0, "length": 0.0}


def rows() -> list[dict[str, Any]]:
    noise = random.Random(0)
    group = list(calculator_group())
    rewards: list[float | None] = [1.0, 1.0, 0.5, 0.0]
    found = [
        row_of(replace(sample, reward=reward, reward_parts=parts(reward)), noise, rewards)
        for sample, reward in zip(group, rewards, strict=True)
    ]
    for sample in others():
        found.append(row_of(replace(sample, reward=1.0, reward_parts=parts(1.0)), noise, [1.0]))
    found[-2] |= {"verdict_error": "verify: TimeoutError", "reward": None, "advantage": None}
    return found


def write_tool_samples(folder: Path) -> Path:
    """The folder of a run, with two steps of these samples."""
    writer = SamplesWriter(folder)
    for step in (1, 2):
        writer.write(step, rows())
    return folder


if __name__ == "__main__":
    write_tool_samples(Path(sys.argv[1]))
