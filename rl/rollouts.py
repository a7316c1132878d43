"""This rank's rollouts: prompts from the stream to the engine, and groups that are finished to the trainer."""

from __future__ import annotations

import time
from collections.abc import Sequence

from conf.schema import RLConfig
from rl.buffer import Buffer
from rl.messages import RolloutRequest, Sample, Stretch
from rl.prompts import PromptStream
from rl.rollout import RolloutEngine
from rl.summary import of_all_ranks
from train import distributed


class Rollouts:
    """`drawn` and `seconds` are those since `start_iteration`."""

    def __init__(self, engine: RolloutEngine, stream: PromptStream, rl: RLConfig) -> None:
        self.engine, self.stream, self.rl = engine, stream, rl
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.buffer = Buffer(rl.prompts_per_step, rl.group_size)
        self.start_iteration(0)

    def start_iteration(self, version: int) -> None:
        """`version`: iteration of the engine's weights."""
        self.engine.weight_version = version
        self.drawn: list[Stretch] = []
        self.seconds = 0.0

    def groups(self) -> list[Sample]:
        """Samples of the iteration's next prompts and of those that go on -> the finished groups. All ranks call it."""
        taken = [] if self.rl.rollout_tokens is None else of_all_ranks(self.buffer.places)
        return self._draw(self.stream.requests(self.rank, self.world, taken), self.buffer.unfinished)

    def replacements(self, left_out: Sequence[int]) -> list[Sample]:
        """The finished groups of further prompts in the places of groups that are left out, see `PromptStream`."""
        return self._draw(self.stream.replacements(left_out, self.rank, self.world), [])

    def _draw(self, requests: Sequence[RolloutRequest], begun: Sequence[Sample]) -> list[Sample]:
        start = time.monotonic()
        samples = self.engine.generate(requests, begun=begun, limit=self.rl.rollout_tokens)
        self.seconds += time.monotonic() - start
        before = [len(request.prompt_ids) for request in requests] + [len(sample.tokens) for sample in begun]
        self.drawn += [Stretch(sample, size) for sample, size in zip(samples, before, strict=True)]
        return self.buffer.take(samples)
