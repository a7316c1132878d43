"""Multi-turn rollouts with tools, over any engine: the policy writes, its calls are run, it reads the results and goes
on in the same chain of thought (DeepSeek-V3.2, sec. 3.2.1).

In rounds: every trajectory draws one message, then all calls of the round run side by side, then the next round. How
long a tool takes decides nothing about who shares a batch, so a run with deterministic tools repeats bit for bit; the
price is that a round waits for its slowest call. Whoever has ended makes room for the next in the round after. An
engine sees ordinary requests and samples that go on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from conf.errors import UserError
from conf.schema import RLConfig
from data.chat import encode_question, encode_tool_results
from data.dsml import OPENER, parse_turn
from data.tokenizer import END_THINK
from rl.env.environment import Environment
from rl.messages import RolloutRequest, Sample, prompt_columns
from rl.offer import Offer, problem_of
from rl.rollout import RolloutEngine
from rl.rollout.trajectory import Room, Trajectory
from rl.tools.plain import clean
from rl.tools.runner import ToolBox, described
from rl.tools.tool import Tool


@dataclass
class _Player:
    """A trajectory with what it is played with."""

    trajectory: Trajectory
    tools: list[Tool]
    box: ToolBox
    environment: Environment | None
    offered: bool  # whether calls are answered
    user_turn: int = 0
    verdict: float | None = None
    verdict_error: str = ""


class ToolLoop:
    """See `RolloutEngine`. Prompts that are offered nothing go straight to `engine`. `window`: tokens of a row."""

    def __init__(
        self, engine: RolloutEngine, tokenizer: PreTrainedTokenizerFast, rl: RLConfig, offer: Offer, window: int
    ) -> None:
        self.engine, self.tokenizer, self.rl, self.offer = engine, tokenizer, rl, offer
        tools = rl.tools
        self.room = Room(window, tools.max_turns, offer.rule, tools.context, tools.context_share)

    @property
    def weight_version(self) -> int:
        return self.engine.weight_version

    @weight_version.setter
    def weight_version(self, version: int) -> None:
        self.engine.weight_version = version

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        done: Callable[[int], object] = lambda finished: None,
        *,
        begun: Sequence[Sample] = (),
        limit: int | None = None,
    ) -> list[Sample]:
        """See `RolloutEngine`; no sample with tools is cut or goes on (conf/validate.py)."""
        if not any(self.offer.plays(request) for request in requests):
            return self.engine.generate(requests, done, begun=begun, limit=limit)
        assert limit is None and not begun, "a trajectory with tools is drawn in one go"
        return self._generate(requests, done)

    def _generate(self, requests: Sequence[RolloutRequest], done: Callable[[int], object]) -> list[Sample]:
        """Draws in this thread; everything that tools and environments do is in the loop's."""
        loop = self.offer.loop
        plain = {number: request for number, request in enumerate(requests) if not self.offer.plays(request)}
        players: dict[int, _Player] = {}
        found: dict[int, Sample] = {}
        waiting = deque(number for number in range(len(requests)) if number not in plain)
        drawing: dict[int, _Player] = {}
        try:
            while plain or drawing or waiting:
                while waiting and len(drawing) < self.rl.tools.concurrent:
                    number = waiting.popleft()
                    try:  # an environment is anybody's code: what it raises costs its sample, not the run
                        player = self._player(requests[number])
                    except UserError:
                        raise
                    except Exception as failure:
                        found[number] = not_played(requests[number], self.weight_version, described(failure))
                        done(1)
                    else:
                        drawing[number] = players[number] = player
                drawn = self._draw(plain, drawing, done)
                found |= {number: drawn.pop(number) for number in plain}
                reacting = [self._react(drawing[number], sample) for number, sample in drawn.items()]
                loop.wait(_all(reacting), lambda: done(0))
                ended = {n: p for n, p in drawing.items() if p.trajectory.finish_reason is not None}
                # a verifier may stand in a queue behind all others: how slow the others are must not fail its grade
                deadline = self.rl.tools.seconds * (1 + len(ended))
                loop.wait(_all([self._finish(player, deadline) for player in ended.values()]), lambda: done(0))
                found |= {number: sample_of(player) for number, player in ended.items()}
                done(len(plain) + len(ended))
                plain, drawing = {}, {n: p for n, p in drawing.items() if n not in ended}
        finally:
            loop.wait(_all([player.box.close() for player in players.values()]))
        return [found[number] for number in range(len(requests))]

    def _player(self, request: RolloutRequest) -> _Player:
        tools = self.offer.tools(request)
        trajectory = Trajectory(
            request,
            self.offer.messages(request),
            self.room,
            self.offer.encode,
            lambda results: encode_tool_results(results, self.tokenizer),
            lambda content: encode_question(content, self.tokenizer),
        )
        box, environment = ToolBox(tools, self.offer.shared.limits), self.offer.environment(request)
        return _Player(trajectory, tools, box, environment, self.offer.has_tools(request))

    def _draw(
        self, plain: Mapping[int, RolloutRequest], drawing: Mapping[int, _Player], done: Callable[[int], object]
    ) -> dict[int, Sample]:
        """One message of every trajectory, and the samples of prompts without tools, by number."""
        new, begun = dict(plain), dict[int, Sample]()
        for number, player in drawing.items():
            going_on = player.trajectory.begun
            if going_on is None:
                new[number] = player.trajectory.ask
            else:
                begun[number] = going_on
        samples = self.engine.generate(list(new.values()), lambda _: done(0), begun=list(begun.values()))
        return dict(zip([*new, *begun], samples, strict=True))

    async def _react(self, player: _Player, sample: Sample) -> None:
        """What follows a message: its calls, a summary, a user's next message, or the end."""
        trajectory, turn = player.trajectory, parse_turn(sample.text)
        trajectory.take(sample, turn)
        if trajectory.finish_reason is not None:
            return
        if trajectory.summary_asked_at is not None:
            trajectory.begin_again(turn.content if turn.error is None else "")
        elif turn.calls and player.offered:
            records = await player.box.run(turn.calls)
            trajectory.calls += records
            submitted = next((record.result for record in records if record.ended), None)
            if submitted is not None:
                trajectory.end("stop", submitted)
            else:
                trajectory.read_results([record.result for record in records], self.weight_version)
        elif player.offered and OPENER in sample.text:
            reason = turn.error or "a call inside the thought runs nothing: end the thought, then call"
            trajectory.num_malformed += 1
            trajectory.read_results([f"Error: {reason}"], self.weight_version, answered=False)
        else:
            await self._answered(player, None if turn.error else turn.content)

    async def _answered(self, player: _Player, answer: str | None) -> None:
        """The user turn has ended; the environment may have the user say something more."""
        trajectory, environment = player.trajectory, player.environment
        message = None
        if environment is not None:
            problem = problem_of(trajectory.request)
            stepping = environment.step(problem, answer or "", player.tools, player.user_turn)
            try:  # as in `_generate`
                message = await asyncio.wait_for(stepping, self.rl.tools.seconds)
                if message is not None:
                    message = clean(message)
            except Exception as failure:
                message, player.verdict_error = None, f"step: {described(failure)}"
        if message is None:
            trajectory.end("stop", answer)
        else:
            player.user_turn += 1
            trajectory.hear(message, self.weight_version)

    async def _finish(self, player: _Player, deadline: float) -> None:
        """The environment's verdict on how it ended, before the tools are closed."""
        environment, trajectory = player.environment, player.trajectory
        if environment is not None and not player.verdict_error:
            verifying = environment.verify(problem_of(trajectory.request), trajectory.answer or "", player.tools)
            try:  # as above: a verifier that fails is a failed grade
                verdict = float(await asyncio.wait_for(verifying, deadline))
                if 0.0 <= verdict <= 1.0:
                    player.verdict = verdict
                else:
                    player.verdict_error = f"verify: {verdict} is outside [0, 1]"
            except Exception as failure:
                player.verdict_error = f"verify: {described(failure)}"
        await player.box.close()


async def _all(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    await asyncio.gather(*work)


def not_played(request: RolloutRequest, version: int, reason: str) -> Sample:
    """A sample without a token: its grade fails, and its group is left out."""
    return Sample(request, prompt_columns(request.prompt_ids, version), "", "stop", verdict_error=reason)


def sample_of(player: _Player) -> Sample:
    """What came of a trajectory. Its text, for graders: all thoughts, and behind `</think>` the answer, if it came to
    one."""
    t = player.trajectory
    assert t.row is not None and t.finish_reason is not None
    text = "\n".join(t.thoughts) + ("" if t.answer is None else END_THINK + t.answer)
    return Sample(
        t.request,
        t.row,
        text,
        t.finish_reason,
        earlier=tuple(t.earlier),
        said=tuple(t.said),
        calls=tuple(t.calls),
        resumed=t.resumed,
        num_malformed=t.num_malformed,
        verdict=player.verdict,
        verdict_error=player.verdict_error,
    )
