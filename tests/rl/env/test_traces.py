"""A trace is a conversation that the encoder can read, with what the tools really said, and slips that recover."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from data.calls import ToolCall
from rl.env.calculator import CalculatorEnvironment
from rl.env.environment import EnvProblem, Said, Solution
from rl.env.registry import ENVIRONMENTS
from rl.env.traces import AGAIN, Trace, play, slipped
from rl.tools.tool import Tool
from tests.rl.env.test_environments import problems

CALCULATOR = ENVIRONMENTS["calculator"]


def played(name: str, level: int, index: int, slip: random.Random | None = None) -> Trace:
    return asyncio.run(play(ENVIRONMENTS[name], problems(name, level, index + 1)[index], slip))


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_row_is_a_whole_conversation(name: str) -> None:
    for index in range(10):
        row = json.loads(json.dumps(played(name, 1, index).row()))
        messages = row["messages"]
        assert [message["role"] for message in (messages[0], messages[-1])] == ["user", "assistant"]
        assert "tool_calls" not in messages[-1] and messages[-1]["content"]
        waiting = 0
        names = {tool["function"]["name"] for tool in row["tools"]}
        for message in messages[1:]:
            if message["role"] == "tool":
                waiting -= 1
                assert isinstance(message["content"], str)
                continue
            assert message["role"] == "assistant" and waiting == 0 and message["reasoning_content"]
            for call in message.get("tool_calls", ()):
                waiting += 1
                assert call["type"] == "function" and call["function"]["name"] in names
                assert isinstance(json.loads(call["function"]["arguments"]), dict)
        assert waiting == 0


def test_the_reasoning_goes_on_from_each_result() -> None:
    for index in range(40):
        messages = played("calculator", 3, index).messages
        for result, after in zip(messages[2::2], messages[3::2], strict=True):
            assert result["role"] == "tool" and result["content"] in after["reasoning_content"]
        assert messages[-1]["content"] == messages[-2]["content"]
    thoughts = Counter(played("calculator", 2, index).messages[1]["reasoning_content"][:5] for index in range(60))
    assert len(thoughts) >= 3


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_slip_fails_has_no_effect_and_is_mended(name: str) -> None:
    slips = 0
    for index in range(30):
        plain, trace = played(name, 1, index), played(name, 1, index, random.Random(index))
        assert trace.verdict == plain.verdict == 1.0 and plain.slips == 0
        slips += trace.slips
        if not trace.slips:
            assert trace == plain
            continue
        mended = [i for i, message in enumerate(trace.messages) if message.get("reasoning_content") in AGAIN]
        assert len(mended) == 1
        assert "Error" in trace.messages[mended[0] - 1]["content"]
        assert trace.messages[mended[0]]["tool_calls"][0] != trace.messages[mended[0] - 2]["tool_calls"][0]
        without = trace.messages[: mended[0] - 2] + trace.messages[mended[0] :]
        without[mended[0] - 2] = plain.messages[mended[0] - 2]
        assert without == plain.messages
    assert slips >= 10


def test_slips_are_of_every_kind() -> None:
    rng = random.Random(0)
    call = ToolCall("calculator", {"expression": "1+1"})
    found = {(one.name, json.dumps(one.arguments)) for one in (slipped(call, rng) for _ in range(100))}
    assert found == {
        ("calculato", '{"expression": "1+1"}'),
        ("calculator", '{"expression": "1+1="}'),
        ("calculator", "{}"),
        ("calculator", '{"expressio": "1+1"}'),
    }
    assert slipped(ToolCall("list_events"), rng).name == "list_event"


class Wrong(CalculatorEnvironment):
    """Answers 7, and remembers whether its tools were closed."""

    closed = 0

    def tools(self, problem: EnvProblem) -> list[Tool]:
        found = super().tools(problem)

        async def close() -> None:
            Wrong.closed += 1

        found[0].close = close  # type: ignore[method-assign]
        return found

    def solve(self, problem: EnvProblem) -> Solution:
        yield Said("Try.", calls=(ToolCall("calculator", {"expression": "3+4"}),))
        return Said("It is 7.", "7")


class Broken(Wrong):
    async def verify(self, problem: EnvProblem, answer: str, tools: Sequence[Tool]) -> float:
        raise RuntimeError("the verifier is broken")


def test_a_wrong_end_is_told_and_tools_are_closed_whatever_happens() -> None:
    problem = problems("calculator", 1, 1)[0]
    trace = asyncio.run(play(Wrong(), problem))
    assert trace.verdict == 0.0 and trace.messages[-1]["content"] == "7" and Wrong.closed == 1
    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(play(Broken(), problem))
    assert Wrong.closed == 2


def test_tools_stand_in_the_row_as_the_model_sees_them() -> None:
    schemas: list[dict[str, Any]] = played("tickets", 1, 0).tools
    assert [one["function"]["name"] for one in schemas][:2] == ["list_events", "list_seats"]
    assert all(one["type"] == "function" and one["function"]["parameters"]["type"] == "object" for one in schemas)
