"""Samples of trajectories with tools, without an engine: a script says what the policy says, the rest is the real thing
(encoding, context rules, tool box)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from data.calls import ToolCall
from data.chat import encode_prompt, encode_tool_results
from data.context import CONTEXT_RULES
from data.dsml import call_pieces, parse_turn
from data.pieces import Piece, ids_of, text_of
from data.tokenizer import EOS, load_tokenizer
from rl.messages import RolloutRequest, Sample, TokenColumns, prompt_columns
from rl.rollout.trajectory import Room, Trajectory
from rl.tools.runner import CallLimits, ToolBox
from rl.tools.tool import Tool

TOKENIZER = load_tokenizer("bytes")


def says(thought: str, content: str = "", *calls: tuple[str, dict[str, Any]]) -> str:
    """A message; `calls`: names and arguments."""
    block = text_of(call_pieces([ToolCall(name, arguments) for name, arguments in calls])) if calls else ""
    return f"{thought}</think>{content}{block}"


def _drawn(before: TokenColumns, text: str, room: int) -> TokenColumns:
    ids = ids_of([Piece(text + EOS, markup=True)], TOKENIZER)[0][:room]
    size = len(ids)
    return TokenColumns(
        before.ids + ids,
        before.loss_mask + [True] * size,
        before.behaviour_logprobs + [-0.25] * size,
        before.weight_versions + [0] * size,
        before.turns + before.turns[-1:] * size,
    )


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
    context = CONTEXT_RULES[rule]

    def encode(messages: Sequence[dict[str, Any]]) -> list[int]:
        return encode_prompt(messages, TOKENIZER, context=context)

    asked = replace(asked, prompt_ids=tuple(encode(messages)))
    room = Room(window, max_turns, context, management, 0.8)
    trajectory = Trajectory(asked, messages, room, encode, lambda results: encode_tool_results(results, TOKENIZER))
    return asyncio.run(_played(trajectory, ToolBox(tools, CallLimits()), list(said), list(heard)))


async def _played(t: Trajectory, box: ToolBox, said: list[str], heard: list[str]) -> Sample:
    while t.finish_reason is None:
        before = t.row or prompt_columns(t.prompt_ids, 0)
        row = _drawn(before, said.pop(0), t.ask.max_new_tokens - before.num_sampled)
        ended = row.ids[-1] == TOKENIZER.eos_token_id
        ids = row.ids[len(before) : len(row) - ended]
        text = str(TOKENIZER.decode(ids, skip_special_tokens=False))
        turn = parse_turn(text)
        t.take(Sample(t.ask, row, text, "stop" if ended else "length"), turn)
        if t.finish_reason is not None:
            break
        if turn.calls:
            records = await box.run(turn.calls)
            t.calls += records
            submitted = next((record.result for record in records if record.ended), None)
            if submitted is None:
                t.read_results([record.result for record in records], 0)
            else:
                t.end("stop", submitted)
        elif turn.error is not None and "<｜DSML｜" in text:
            t.num_malformed += 1
            t.read_results([f"Error: {turn.error}"], 0)
        elif heard:
            t.hear(heard.pop(0))
        else:
            t.end("stop", None if turn.error else turn.content)
    await box.close()
    text = "\n".join(t.thoughts) + ("" if t.answer is None else "</think>" + t.answer)
    assert t.row is not None and t.finish_reason is not None and not said
    calls = tuple(replace(call, seconds=0.034 * (n + 1)) for n, call in enumerate(t.calls))  # a clock of its own
    return Sample(
        t.request, t.row, text, t.finish_reason, tuple(t.earlier), said=tuple(t.said), calls=calls, resumed=t.resumed
    )
