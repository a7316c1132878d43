"""Rollouts beside the updates (`rl.max_staleness`): servers draw without a pause, the trainer takes what has come.

Bounded staleness as in AReaL (arXiv 2505.24298, eq. 3): with version i of the weights, a group is started only while
the groups started do not come to more than (i + max_staleness + 1) * prompts_per_step. An iteration trains on the
`prompts_per_step` groups that were started first among those that have come. Weights change under what is in work,
whose later tokens are then of newer ones; every token's stamp says which. A group is as old as its oldest token. One
that comes too late, because its longest answer took more than `max_staleness` updates, is dropped, and another prompt
asked in its place.

All ranks know of every group which rank asks for it, and by one small collective which have come: they choose alike,
however late one of them is. When answers come is nobody's choice, so no two runs are the same to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import RLConfig
from rl.groups import Experience
from rl.messages import CUT, RolloutRequest, Sample, Stretch, prompt_columns
from rl.prompts import PromptStream
from rl.rollout import RolloutEngine
from rl.rollout.asking import Asking
from rl.rollout.fleet import ServersLost
from rl.rollouts import Rollouts
from rl.stored import from_tensors, to_tensors
from rl.summary import age_metrics
from train import distributed

POLL_S = 0.1  # between looks at what came to other ranks


class AheadRollouts(Rollouts):
    """See `Rollouts`. `iterations`: of the whole run, the last of which start nothing that nobody would train on."""

    def __init__(self, engine: RolloutEngine, stream: PromptStream, rl: RLConfig, iterations: int) -> None:
        super().__init__(engine, stream, rl)
        self.iterations = iterations
        self.asking = Asking(self._ask, groups_at_once(rl))
        # the same on all ranks:
        self.owners: dict[int, int] = {}  # groups that were started and not yet taken -> the rank that asks for them
        self.started = self.dropped = 0  # groups of the run
        self._again: dict[int, list[RolloutRequest]] = {}  # of a checkpoint, until there are weights to ask
        self._oldest: dict[int, int] = {}  # of what came here
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.asking.close()

    def start_iteration(self, version: int) -> None:
        super().start_iteration(version)
        self.version = version
        self.taken = self.trained = 0  # groups of this iteration; `trained`: but for those that were left out again
        self.wait_s = 0.0

    def groups(self) -> list[Sample]:
        for number, requests in self._again.items():
            self.asking.start(number, requests)
        self._again = {}
        return self._choose(self.rl.prompts_per_step)

    def replacements(self, left_out: Sequence[int]) -> list[Sample]:
        self.trained -= len(left_out)
        return self._choose(len(left_out))

    def _ask(self, requests: Sequence[RolloutRequest], check: Callable[..., None]) -> list[Sample]:
        return self.engine.generate(requests, check)

    def _choose(self, count: int) -> list[Sample]:
        """The samples of this rank among the next `count` groups of all, which get their places in the iteration."""
        begin = time.monotonic()
        while True:
            self._start_groups()
            came = self._came()
            late = [number for number, oldest in came.items() if self.version - oldest > self.rl.max_staleness]
            for number in late:
                self._leave(number)
            self.dropped += len(late)
            if late:
                continue  # others are started in their places first
            if len(came) >= count:
                break
            self.asking.wait(POLL_S)
        found = []
        for number in sorted(came)[:count]:
            for sample in self._leave(number):
                found.append(replace(sample, request=replace(sample.request, prompt_index=self.taken)))
            self.taken += 1
        self.trained += count
        now = time.monotonic()
        self.wait_s += now - begin
        self.seconds, self._since = self.seconds + now - self._since, now
        return found

    def _start_groups(self) -> None:
        """As many as the bound leaves room for, each by the rank that has fewest."""
        ahead = min(self.rl.max_staleness + 1, self.iterations - self.version)
        held = [0] * self.world
        for owner in self.owners.values():
            held[owner] += 1
        for _ in range(ahead * self.rl.prompts_per_step - self.trained - len(self.owners)):
            number, self.started = self.started, self.started + 1
            owner = min(range(self.world), key=lambda rank: (held[rank], (rank - number) % self.world))
            requests = self.stream.group(number)
            self.owners[number] = owner
            held[owner] += 1
            if owner == self.rank:
                self.asking.start(number, requests)

    def _came(self) -> dict[int, int]:
        """Groups that have come and wait, of all ranks -> the version that drew their oldest token. Raises what
        hindered a thread, on all ranks where it is no fault of ours."""
        fault = self.asking.fault
        told = fault if isinstance(fault, UserError | ServersLost) else None
        if fault is not None and told is None:
            raise fault
        for number, samples in self.asking.state()[0].items():
            if number not in self._oldest:
                self._oldest[number] = oldest_version(samples, self.version)
        found: dict[int, int] = {}
        for fault, theirs in distributed.gather_objects((told, self._oldest)):
            if fault is not None:
                raise fault
            found |= theirs
        return found

    def _leave(self, number: int) -> list[Sample]:
        """The group's samples where this rank asked for them."""
        if self.owners.pop(number) != self.rank:
            return []
        samples = self.asking.take(number)
        del self._oldest[number]
        self.drawn += [Stretch(sample, len(sample.request.prompt_ids)) for sample in samples]
        return samples

    def metrics(self, experience: Experience, version: int) -> dict[str, float]:
        came, asked = self.asking.state()
        return age_metrics(experience, version, {"queued": len(came), "in_flight": len(asked)}) | {
            "staleness/dropped": self.dropped,
            "async/wait_s": self.wait_s,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The groups that came and nobody trained on, and the requests of those that did not come."""
        came, asked = self.asking.state()
        asked |= self._again
        blank = [Sample(r, prompt_columns(r.prompt_ids, 0), "", CUT) for group in asked.values() for r in group]
        found = {f"came.{name}": value for name, value in to_tensors([s for g in came.values() for s in g]).items()}
        found |= {f"asked.{name}": value for name, value in to_tensors(blank).items()}
        owners = [number for pair in self.owners.items() for number in pair]
        counts = [self.started, self.dropped]
        numbers = {"came": list(came), "asked": list(asked), "owners": owners, "counts": counts}
        return found | {f"ahead.{name}": torch.tensor(each, dtype=torch.int64) for name, each in numbers.items()}

    def load(self, tensors: Mapping[str, Tensor], step: int, position: int, too_long: int) -> None:
        """As `Rollouts.load`. What was asked for is asked again once there are weights to ask for."""
        self.stream.go_to(step, position, too_long)
        if not tensors:
            return

        def groups(name: str) -> dict[int, list[Sample]]:
            of = {n.removeprefix(f"{name}."): value for n, value in tensors.items() if n.startswith(f"{name}.")}
            samples, size = from_tensors(of), self.rl.group_size
            return {n: samples[i * size : (i + 1) * size] for i, n in enumerate(tensors[f"ahead.{name}"].tolist())}

        self.started, self.dropped = tensors["ahead.counts"].tolist()
        self.owners = dict(tensors["ahead.owners"].view(-1, 2).tolist())
        for number, samples in groups("came").items():
            self.asking.put(number, samples)
        self._again = {n: [sample.request for sample in samples] for n, samples in groups("asked").items()}


def groups_at_once(rl: RLConfig) -> int:
    """How many a rank asks for at a time: what its places at the servers hold; trajectories with tools are bound
    among themselves as well."""
    samples = rl.servers.concurrent * max(1, len(rl.servers.urls))
    if rl.needs_tools:
        samples = min(samples, rl.tools.concurrent)
    return max(1, samples // rl.group_size)


def oldest_version(samples: Sequence[Sample], now: int) -> int:
    """Of the weights that drew a token of them; `now` where none was drawn."""
    return min((version for sample in samples for version in sample.drawn_by), default=now)
