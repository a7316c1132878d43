"""Samples of trajectories with tools, without an engine: a script says what the policy says, the rest is the real
thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from conf.schema import RLConfig, ToolsConfig
from data.calls import ToolCall
from data.chat import encode_prompt
from data.context import CONTEXT_RULES
from data.dsml import call_pieces
from data.pieces import text_of
from rl.messages import RolloutRequest, Sample
from rl.rollout.tool_loop import ToolLoop
from rl.tools.loop_thread import LoopThread
from rl.tools.runner import CallLimits
from rl.tools.tool import Tool
from tests.rl.test_tool_loop import TOKENIZER, Scripted


def says(thought: str, content: str = "", *calls: tuple[str, dict[str, Any]]) -> str:
    """A message; `calls`: names and arguments."""
    block = text_of(call_pieces([ToolCall(name, arguments) for name, arguments in calls])) if calls else ""
    return f"{thought}</think>{content}{block}"


class _User:
    """An environment that says what is next in `heard`, and finds everything right."""

    def __init__(self, heard: Sequence[str]) -> None:
        self.heard = list(heard)

    async def step(self, *_: Any) -> str | None:
        return self.heard.pop(0) if self.heard else None

    async def verify(self, *_: Any) -> float:
        return 1.0


def play(
    said: Sequence[str],
    tools: Sequence[Tool],
    heard: Sequence[str] = (),
    window: int = 20_000,
    max_turns: int = 20,
    rule: str = "v3_2",
    management: str = "none",
    **request: Any,
) -> Sample:
    """A sample in which the assistant says `said` and the user, wherever it has answered, says what is next in `heard`.
    `request`: fields of its RolloutRequest."""
    fields = {"prompt_index": 0, "sample_index": 0, "domain": "calc", "prompt": "1+1?", "answer": "2", "seed": 0}
    asked = RolloutRequest(**(fields | {"max_new_tokens": 20_000, "prompt_ids": ()} | request))
    system = {"role": "system", "content": "", "tools": [tool.schema() for tool in tools]}
    messages = [*([system] if tools else []), {"role": "user", "content": asked.prompt}]
    context, loop = CONTEXT_RULES[rule], LoopThread("played")

    def encode(messages: Sequence[dict[str, Any]], rule: Any = None) -> list[int]:
        return encode_prompt(messages, TOKENIZER, context=rule or context)

    offer: Any = SimpleNamespace(
        rule=context,
        loop=loop,
        shared=SimpleNamespace(limits=CallLimits()),
        plays=lambda asked: True,
        has_tools=lambda asked: bool(tools),
        tools=lambda asked: list(tools),
        environment=lambda asked: _User(heard),
        messages=lambda asked: list(messages),
        encode=encode,
    )
    script = list(said)
    engine = Scripted(lambda request, number: script.pop(0))
    engine.weight_version = 0
    rl = RLConfig(tools=ToolsConfig(max_turns=max_turns, reasoning=rule, context=management))
    try:
        whole = replace(asked, prompt_ids=tuple(encode(messages)))
        (sample,) = ToolLoop(engine, TOKENIZER, rl, offer, window).generate([whole])
    finally:
        loop.close()
    assert not script, "all was said"
    calls = tuple(replace(call, seconds=0.034 * (n + 1)) for n, call in enumerate(sample.calls))  # a clock of its own
    return replace(sample, calls=calls)
