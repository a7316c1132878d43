"""The cold start: an environment's scripted solver, played against its real tools, as a conversation for SFT.

    {"messages": [{"role": "user", ...}, {"role": "assistant", "reasoning_content", "content", "tool_calls"},
                  {"role": "tool", "content"}, ..., {"role": "assistant", ...}], "tools": [schemas]}

What the tools said stands in it as they said it, and the verifier judges the end, so a trace with verdict 1 is a proof
that the problem can be solved. A trace may hold a slip: one call that fails, its error, and the call once more. Or it
answers from the head, without a call: the other half of a choice that RL is to find the better half of.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data.calls import ToolCall
from rl.env.environment import Environment, EnvProblem, Said

AGAIN = (
    "That call failed; again, as it should be.",
    "An error. Once more, right this time.",
    "The call was wrong; again.",
)


@dataclass(frozen=True)
class Trace:
    """verdict: the environment's, in [0, 1]; slips: calls that failed on purpose."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    verdict: float
    slips: int = 0

    def row(self, bare: bool = False) -> dict[str, Any]:
        """bare: without the schemas."""
        return {"messages": self.messages} | ({} if bare else {"tools": self.tools})


@dataclass
class _Player:
    """`box`: the trajectory's rl.tools.runner.ToolBox."""

    box: Any
    messages: list[dict[str, Any]] = field(default_factory=list)

    async def run(self, said: Said) -> list[Any]:
        """Writes the message down, runs its calls, writes their results down."""
        self.messages.append(_message(said))
        records = await self.box.run(said.calls)
        self.messages += [{"role": "tool", "content": record.result} for record in records]
        return list(records)


async def play(environment: Environment, problem: EnvProblem, slip: random.Random | None = None) -> Trace:
    """One trace. `slip`: makes one of the calls fail first; which and how, it draws."""
    from rl.tools.runner import CallLimits, ToolBox

    tools = environment.tools(problem)
    player = _Player(ToolBox(tools, CallLimits()), [{"role": "user", "content": problem.prompt}])
    slips = 0
    try:
        solution = environment.solve(problem)
        results: list[str] | None = None
        while True:
            try:
                said = next(solution) if results is None else solution.send(results)
            except StopIteration as end:
                last: Said = end.value
                break
            if slip is not None and not slips and slip.random() < 0.5:
                wrong = await player.run(Said(said.reasoning, said.content, (slipped(said.calls[0], slip),)))
                assert wrong[0].error, "a slip is a call that fails"
                said = Said(slip.choice(AGAIN), said.content, said.calls)
                slips = 1
            results = [record.result for record in await player.run(said)]
        player.messages.append(_message(last))
        verdict = await environment.verify(problem, last.content, tools)
    finally:
        await player.box.close()
    return Trace(player.messages, [tool.schema() for tool in tools], verdict, slips)


async def at_once(environment: Environment, problem: EnvProblem, trace: Trace) -> Trace:
    """What a trace ends with, said at once; the verdict is that on tools which nobody has called."""
    last = trace.messages[-1]
    tools = environment.tools(problem)
    try:
        verdict = await environment.verify(problem, last["content"], tools)
    finally:
        for tool in tools:
            await tool.close()
    return Trace([trace.messages[0], last], trace.tools, verdict)


def slipped(call: ToolCall, rng: random.Random) -> ToolCall:
    """The call as a policy gets it wrong: another name, an argument forgotten or misnamed, an expression that is none.
    None of them has an effect."""
    kinds = ["name"]
    if call.arguments:
        kinds += ["forgotten", "misnamed"]
    if "expression" in call.arguments:
        kinds += ["expression"]
    kind = rng.choice(kinds)
    arguments = dict(call.arguments)
    if kind == "name":
        return ToolCall(call.name[:-1], arguments)
    if kind == "expression":
        return ToolCall(call.name, arguments | {"expression": f"{arguments['expression']}="})
    first = next(iter(arguments))
    value = arguments.pop(first)
    return ToolCall(call.name, arguments if kind == "forgotten" else {first[:-1]: value} | arguments)


def _message(said: Said) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "reasoning_content": said.reasoning, "content": said.content}
    if said.calls:
        message["tool_calls"] = _plain(said.calls)
    return message


def _plain(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": {"name": one.name, "arguments": json.dumps(dict(one.arguments))}}
        for one in calls
    ]
