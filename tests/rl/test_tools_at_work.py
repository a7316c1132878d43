"""Many trajectories at once with the real `python` tool in the real sandbox: some hang, some kill their interpreter,
some raise; each pays for itself alone."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from conf.schema import RLConfig, ToolsConfig
from data.calls import ToolCall
from data.dsml import call_pieces
from data.pieces import text_of
from rl.messages import RolloutRequest
from rl.offer import Offer
from rl.rollout.tool_loop import ToolLoop
from tests.rl.test_tool_loop import TOKENIZER, Scripted

NUMBER = 64
LIMIT_S = 40.0  # of a call: a cold start beside 63 others on two busy cores takes ten seconds, on one twenty
KINDS = {  # by number % 8: (what it runs first, what it reads)
    0: ("while True: pass", ""),
    1: ("import os; os._exit(3)", "Error"),
    2: ("1 / 0", "ZeroDivisionError"),
    3: ("x = 40 + 2\nx", "42"),
}


def says(thought: str, content: str = "", code: str | None = None) -> str:
    block = "" if code is None else text_of(call_pieces([ToolCall("python", {"code": code})]))
    return f"{thought}</think>{content}{block}"


def policy(request: RolloutRequest, number: int) -> str:
    kind = request.prompt_index % 8
    if number == 0:
        return says("first", code=KINDS.get(kind, ("y = 5", ""))[0])
    if number == 1:
        return says("then", code="print(6 * 7)")
    return says("so", "done")


def test_sixty_four_trajectories_with_python(tmp_path: Path):
    tools = ToolsConfig(names=("python",), timeout_s=LIMIT_S)
    rl = RLConfig(tools=tools)
    began = time.monotonic()
    with Offer(rl, TOKENIZER, tmp_path) as offer:
        loop = ToolLoop(Scripted(policy), TOKENIZER, rl, offer, 8000)
        asked = [RolloutRequest(index, 0, "math", f"problem {index}", "", (), 3, 4000) for index in range(NUMBER)]
        asked = [replace(r, prompt_ids=tuple(offer.encode(offer.messages(r)))) for r in asked]
        samples = loop.generate(asked)
    seconds = time.monotonic() - began
    assert len(samples) == NUMBER and all(sample.finish_reason == "stop" for sample in samples)
    for sample in samples:
        first, second = sample.calls
        kind = sample.request.prompt_index % 8
        assert KINDS.get(kind, ("", ""))[1] in first.result, first.result
        assert first.error == (kind in (0, 1)), first.result
        assert first.seconds < LIMIT_S + 1
        assert "42" in second.result and not second.error, "the next call of whoever hung or died works"
    assert seconds < 2 * LIMIT_S + 30
