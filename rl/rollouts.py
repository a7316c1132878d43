"""This rank's rollouts: prompts from the stream to the engine, and groups that are finished to the trainer.

With `rl.one_step_off` the batch of an iteration was drawn beside the update of the one before it, by the weights from
before that update (a whole copy, rl/rollout/rollout_copy.py): `begin_next` starts a thread, `end_next` takes what it
drew. The thread samples and does nothing else; which prompts it asks, by which seeds and weights, is settled before it
starts, so its timing decides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from conf.schema import RLConfig
from rl.buffer import Buffer
from rl.groups import Experience
from rl.messages import RolloutRequest, Sample, Stretch
from rl.prompts import PromptStream
from rl.rollout import RolloutEngine
from rl.rollout.beside import Beside
from rl.stored import from_tensors, to_tensors
from rl.summary import of_all_ranks, staleness_metrics
from train import distributed


@dataclass(frozen=True)
class Batch:
    """What is to be sampled: new samples, and those that go on."""

    requests: Sequence[RolloutRequest]
    begun: Sequence[Sample]

    @property
    def starts(self) -> list[int]:
        """Tokens that each sample has before."""
        new = [len(request.prompt_ids) for request in self.requests]
        return new + [len(sample.tokens) for sample in self.begun]


class Rollouts:
    """`drawn` and `seconds` are those since `start_iteration`. A context manager: it ends a thread that a fault of the
    main one leaves behind."""

    def __init__(self, engine: RolloutEngine, stream: PromptStream, rl: RLConfig) -> None:
        self.engine, self.stream, self.rl = engine, stream, rl
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.buffer = Buffer(rl.prompts_per_step, rl.group_size)
        self.waiting: list[Sample] | None = None  # finished groups of the next iteration, once they are drawn
        self._beside: tuple[Batch, Beside[tuple[list[Sample], float]]] | None = None
        self.start_iteration(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._beside is not None:
            self._beside[1].cancel()

    def start_iteration(self, version: int) -> None:
        """`version`: iteration of the engine's weights."""
        self.engine.weight_version = version
        self.drawn: list[Stretch] = []
        self.seconds = 0.0

    def groups(self) -> list[Sample]:
        """The finished groups of the iteration's prompts and of those that went on. All ranks call it."""
        if self.waiting is not None:
            found, self.waiting = self.waiting, None
            return found
        return self._draw(self._next_batch())

    def replacements(self, left_out: Sequence[int]) -> list[Sample]:
        """The finished groups of further prompts in the places of groups that are left out, see `PromptStream`."""
        return self._draw(Batch(self.stream.replacements(left_out, self.rank, self.world), []))

    def begin_next(self) -> None:
        """Starts to draw the next iteration's batch by the engine's weights, which nobody may change until `end_next`.
        All ranks call it."""
        batch = self._next_batch()
        self._beside = batch, Beside(lambda check: self._sample(batch, check), distributed.device())

    def end_next(self) -> None:
        """Waits for the batch that `begin_next` has begun, if it has, and raises what hindered it."""
        if self._beside is not None:
            batch, beside = self._beside
            samples, seconds = beside.result()
            self._beside = None
            self.waiting = self._take(batch, samples, seconds)

    def _next_batch(self) -> Batch:
        taken = [] if self.rl.rollout_tokens is None else of_all_ranks(self.buffer.places)
        return Batch(self.stream.requests(self.rank, self.world, taken), self.buffer.unfinished)

    def _draw(self, batch: Batch) -> list[Sample]:
        return self._take(batch, *self._sample(batch))

    def _sample(self, batch: Batch, check: Callable[..., object] = lambda *_: None) -> tuple[list[Sample], float]:
        start = time.monotonic()
        samples = self.engine.generate(batch.requests, check, begun=batch.begun, limit=self.rl.rollout_tokens)
        return samples, time.monotonic() - start

    def _take(self, batch: Batch, samples: Sequence[Sample], seconds: float) -> list[Sample]:
        self.seconds += seconds
        self.drawn += [Stretch(sample, start) for sample, start in zip(samples, batch.starts, strict=True)]
        return self.buffer.take(samples)

    def metrics(self, experience: Experience, version: int) -> dict[str, float]:
        """How old what is trained on is, where it is not all of now; all ranks call it. `version`: of the weights."""
        if self.rl.rollout_tokens is None and not self.rl.one_step_off:
            return {}
        return staleness_metrics(experience, len(self.buffer.unfinished), version)

    def tensors(self) -> dict[str, Tensor]:
        """The samples that no iteration has seen yet, for a checkpoint."""
        found = {f"carried.{name}": value for name, value in self.buffer.tensors().items()}
        if self.waiting is not None:
            found |= {f"waiting.{name}": value for name, value in to_tensors(self.waiting).items()}
            found["waits"] = torch.ones(1, dtype=torch.bool)  # of the waiting ones there may be none
        return found

    def load(self, tensors: Mapping[str, Tensor], step: int, position: int, too_long: int) -> None:
        """Goes on from what `tensors` gave after `step` iterations; `position`, `too_long`: see `PromptStream`."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)}

        self.buffer.load(part("carried."))
        self.waiting = from_tensors(part("waiting.")) if "waits" in tensors else None
        self.stream.go_to(step + (self.waiting is not None), position, too_long)
