"""Which groups are started, taken and dropped while others draw beside the updates: the bound holds however slow they
are, ranks choose alike, and a checkpoint loses nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch

from conf.schema import RLConfig, ServersConfig
from data.prompts import Prompt
from rl.ahead import AheadRollouts, groups_at_once
from rl.messages import RolloutRequest, Sample, TokenColumns
from rl.prompts import PromptStream
from rl.rollout.fleet import ServersLost
from rl.rollout.server_api import Failed
from tests.distributed.helper import run_ranks
from train import distributed

RL = RLConfig(prompts_per_step=4, group_size=2, max_staleness=1, engine="vllm")
Delay = Callable[[RolloutRequest], float]  # seconds; a whole number: updates, for LONGEST_S at most
LONGEST_S = 3.0


class Slow:
    """Draws two tokens a sample: the first when it is asked, the second after the group's delay."""

    def __init__(self, delay: Delay) -> None:
        self.delay, self.weight_version = delay, 0
        self.asked: list[int] = []

    def generate(
        self, requests: Sequence[RolloutRequest], done: Callable[[int], object] = lambda finished: None, **_: Any
    ) -> list[Sample]:
        first, delay = self.weight_version, self.delay(requests[0])
        updates = delay if isinstance(delay, int) else 0
        end = time.monotonic() + (LONGEST_S if updates else delay)
        self.asked += [request.seed for request in requests]
        while time.monotonic() < end and not 0 < updates <= self.weight_version - first:
            done(0)
            time.sleep(0.002)
        return [self._sample(request, first) for request in requests]

    def _sample(self, request: RolloutRequest, first: int) -> Sample:
        size, last = len(request.prompt_ids), self.weight_version
        tokens = TokenColumns(
            [*request.prompt_ids, 1, 2], [False] * size + [True] * 2, [0.0] * (size + 2), [0] * size + [first, last],
            [0] * (size + 2),
        )  # fmt: skip
        return Sample(request, tokens, "", "length")


def rollouts_of(delay: Delay, rl: RLConfig, iterations: int) -> AheadRollouts:
    prompts = lambda start: (Prompt(prompt="x", answer=str(n), domain="d", key=str(n)) for n in count(start))  # noqa: E731
    stream = PromptStream(prompts, lambda prompt: [7, 8], rl, seed=5, room=1000)
    found = AheadRollouts(Slow(delay), stream, rl, iterations)
    found.load({}, 0, 0, 0)
    return found


def number_of(request: RolloutRequest) -> int:
    """Of its group, among those of the run."""
    return int(request.answer)


def play(delay: Delay, rl: RLConfig, iterations: int, update_s: float | None) -> list[dict[str, Any]]:
    """A run whose updates take so long (None: until all that is asked for has come) -> what each iteration trained on,
    of this rank."""
    found = []
    with rollouts_of(delay, rl, iterations) as rollouts:
        alive = []
        real = rollouts.stream.group

        def group(number: int) -> list[RolloutRequest]:
            alive.append((rollouts.version, number + 1 - rollouts.dropped))
            return real(number)

        rollouts.stream.group = group  # type: ignore[method-assign]
        for version in range(iterations):
            rollouts.start_iteration(version)
            samples = rollouts.groups()
            found.append(
                {
                    "numbers": sorted({number_of(s.request) for s in samples}),
                    "places": sorted({s.request.prompt_index for s in samples}),
                    "ages": [version - by for s in samples for by in s.drawn_by],
                    "drawn": len(rollouts.drawn),
                    "alive": list(alive),
                    "dropped": rollouts.dropped,
                    "started": rollouts.started,
                }
            )
            while update_s is None and rollouts.asking.state()[1]:
                time.sleep(0.002)
            time.sleep(update_s or 0.0)
    return found


def uneven(request: RolloutRequest) -> float:
    """Now and then one that takes many updates."""
    number = number_of(request)
    return 4 if number % 7 == 3 and number < 28 else 0.001 * (number % 5)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("bound", [1, 2])
def test_the_bound_holds_however_slow_a_group_is(bound: int, world: int):
    ranks = run_ranks(play, world, uneven, replace(RL, max_staleness=bound), 12, 0.03)
    last = ranks[0][-1]
    assert last["dropped"] > 0, "the test sees groups that come too late"
    for parts in zip(*ranks, strict=True):
        ages = [age for part in parts for age in part["ages"]]
        assert 0 <= max(ages) <= bound
        assert sorted(place for part in parts for place in part["places"]) == [0, 1, 2, 3]
    assert all(alive <= (version + bound + 1) * 4 for version, alive in last["alive"])
    assert any(alive == (version + bound + 1) * 4 for version, alive in last["alive"])
    trained = [number for rank in ranks for part in rank for number in part["numbers"]]
    assert len(set(trained)) == len(trained) == 12 * 4
    drawn = sum(part["drawn"] for rank in ranks for part in rank)
    assert drawn == 2 * (len(trained) + last["dropped"]), "what is dropped was drawn as well"
    assert max(age for rank in ranks for part in rank for age in part["ages"]) == bound


@pytest.mark.parametrize("bound", [1, 3])
def test_who_comes_in_time_is_trained_in_order_and_nothing_is_started_in_vain(bound: int):
    (found,) = run_ranks(play, 1, lambda request: 0.0, replace(RL, max_staleness=bound), 6, None)
    left = set(range(24))
    for i, part in enumerate(found):  # the first iteration takes whoever came first, the others know all
        assert part["numbers"] == sorted(left)[:4] if i else max(part["numbers"]) < 4 * (bound + 1)
        left -= set(part["numbers"])
    assert not left
    assert [max(part["ages"]) for part in found] == [min(i, bound) for i in range(6)]
    assert found[-1]["dropped"] == 0 and found[-1]["started"] == 24


def late_rank(request: RolloutRequest) -> float:
    return 0.0 if distributed.rank() == 0 else 1.5


def test_a_rank_whose_groups_are_late_holds_nobody_up():
    """Until it has all places: the other rank's groups are trained meanwhile, and all ranks choose alike."""
    first, second = run_ranks(play, 2, late_rank, replace(RL, max_staleness=3), 4, 0.0)
    assert [len(part["numbers"]) for part in first][0] == 4 and not second[0]["numbers"]
    assert all(len(a["numbers"]) + len(b["numbers"]) == 4 for a, b in zip(first, second, strict=True))
    assert any(part["numbers"] for part in second)


def replacing() -> list[list[tuple[int, int]]]:
    found = []
    with rollouts_of(lambda request: 0.0, RL, 3) as rollouts:
        for version in range(3):
            rollouts.start_iteration(version)
            samples = rollouts.groups()
            samples += rollouts.replacements([0, 2]) + rollouts.replacements([4])
            found.append(
                [(s.request.prompt_index, number_of(s.request)) for s in samples if not s.request.sample_index]
            )
    return found


def test_groups_that_are_left_out_are_replaced_by_further_ones():
    (found,) = run_ranks(replacing, 1)
    assert [[place for place, _ in each] for each in found] == [[0, 1, 2, 3, 4, 5, 6]] * 3
    assert [number for each in found for _, number in each] == list(range(21))


def split(world: int) -> dict[str, Any]:
    """Three iterations, a kill, and the rest from what was saved."""
    slow = lambda request: 0.2 if number_of(request) % 3 == 1 else 0.0  # noqa: E731
    rl = replace(RL, max_staleness=2)
    seen: list[tuple[int, int]] = []

    def iterations(rollouts: AheadRollouts, versions: range) -> None:
        for version in versions:
            rollouts.start_iteration(version)
            seen.extend((number_of(s.request), s.request.seed) for s in rollouts.groups())

    with rollouts_of(slow, rl, 6) as before:
        iterations(before, range(3))
    tensors, position = before.tensors(), before.stream.position  # once all threads have ended
    came, asked = before.asking.state()
    with rollouts_of(slow, rl, 6) as after:
        after.load(tensors, 3, position, 0)
        assert after.asking.state()[0] == came
        again = after.tensors()  # before anything is asked for: preempted at once
        iterations(after, range(3, 6))
        engine = after.engine
        assert isinstance(engine, Slow)
        return {
            "seen": seen,
            "asked again": sorted(r.seed for requests in asked.values() for r in requests),
            "seeds": engine.asked,
            "came": [s.request.seed for samples in came.values() for s in samples],
            "kept": again.keys() == tensors.keys() and all(torch.equal(again[n], tensors[n]) for n in tensors),
            "end": (after.started, after.dropped, len(after.owners)),
        }


@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_has_what_came_and_what_is_asked_for(world: int):
    ranks = run_ranks(split, world, world)
    assert sum(len(rank["asked again"]) for rank in ranks) > 0 and sum(len(rank["came"]) for rank in ranks) > 0
    for rank in ranks:
        assert rank["kept"]
        assert set(rank["asked again"]) <= set(rank["seeds"]) and not set(rank["came"]) & set(rank["seeds"])
        assert len(set(rank["seeds"])) == len(rank["seeds"])
    seen = [pair for rank in ranks for pair in rank["seen"]]
    assert len(set(seen)) == len(seen) == 6 * 4 * 2, "nothing is trained twice"
    started, dropped, left = ranks[0]["end"]
    assert started == 24 + dropped + left and left == 0


def failing(fault: Exception) -> str:
    def delay(request: RolloutRequest) -> float:
        if number_of(request) == 5 and distributed.rank() == 1:
            raise fault
        return 0.0

    try:
        play(delay, RL, 3, 0.0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "finished"


def test_servers_that_are_lost_end_all_ranks_alike():
    assert run_ranks(failing, 2, ServersLost("no server")) == ["ServersLost: no server"] * 2


def test_a_fault_of_a_thread_is_raised():
    def alone() -> str:
        def delay(request: RolloutRequest) -> float:
            raise Failed("odd")

        with pytest.raises(Failed, match="odd"):
            play(delay, RL, 3, 0.0)
        return "raised"

    assert run_ranks(alone, 1) == ["raised"]


def test_places_at_the_servers_bound_what_is_asked_for_at_a_time():
    servers = ServersConfig(urls=("http://a:1", "http://b:1"), concurrent=5)
    assert groups_at_once(replace(RL, servers=servers)) == 5
    assert groups_at_once(replace(RL, servers=servers, group_size=16)) == 1

    def most() -> int:
        now = most_yet = 0

        class Counting(Slow):
            def generate(self, *args: Any, **more: Any) -> list[Sample]:
                nonlocal now, most_yet
                now += 1
                most_yet = max(most_yet, now)
                found = super().generate(*args, **more)
                now -= 1
                return found

        rl = replace(RL, servers=replace(servers, concurrent=3), max_staleness=3)
        with rollouts_of(lambda request: 0.01, rl, 3) as rollouts:
            rollouts.engine = Counting(lambda request: 0.01)
            for version in range(3):
                rollouts.start_iteration(version)
                rollouts.groups()
        return most_yet

    assert run_ranks(most, 1) == [3]
