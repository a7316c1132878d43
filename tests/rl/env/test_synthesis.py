"""What synthesis keeps and what it throws away: unsound tasks, and those that a policy never solves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from data.calls import ToolCall
from rl.env.environment import EnvProblem, Said, Solution
from rl.env.registry import ENVIRONMENTS
from rl.env.synthesis import is_sound, passes_at, synthesise
from rl.env.ticket_world import World, WorldTool
from rl.env.tickets import TicketsEnvironment
from rl.tools.tool import Tool, ToolError

TICKETS = ENVIRONMENTS["tickets"]


class Lazy(TicketsEnvironment):
    """Its solver does nothing."""

    def solve(self, problem: EnvProblem) -> Solution:
        yield Said("Look.", calls=(ToolCall("list_events"),))
        return Said("", "Done.")


class Generous(TicketsEnvironment):
    """Its verifier takes everything."""

    async def verify(self, problem: EnvProblem, answer: str, tools: Sequence[Tool]) -> float:
        return 1.0


def random_policy(seed: int) -> tuple[list[str], object]:
    """(keys that were tried, a policy that makes up to three random calls)."""
    rng, tried = random.Random(seed), []

    async def attempt(problem: EnvProblem) -> bool:
        tried.append(problem.key)
        tools = TICKETS.tools(problem)
        world = next(tool.world for tool in tools if isinstance(tool, WorldTool))
        for _ in range(rng.randint(1, 2)):
            try:
                _random_call(rng, world)
            except ToolError:
                pass
        return await TICKETS.verify(problem, "", tools) == 1.0

    return tried, attempt


def _random_call(rng: random.Random, world: World) -> None:
    if rng.random() < 0.5:
        event = rng.choice(list(world.events))
        world.book(rng.choice(list(world.customers)), event, rng.choice(world.events[event].seats))
    else:
        world.cancel(rng.choice(list(world.bookings)))


def collect(environment: TicketsEnvironment, level: int, num: int, **options: object) -> list[EnvProblem]:
    async def run() -> list[EnvProblem]:
        return [problem async for problem in synthesise(environment, level, num, **options)]  # type: ignore[arg-type]

    return asyncio.run(run())


def test_sound_tasks_are_kept_in_order_and_once() -> None:
    kept = collect(TicketsEnvironment(), 2, 30)
    assert kept == [TICKETS.problem_at(index, "train", 0, 2, 0.1) for index in range(30)]
    held = collect(TicketsEnvironment(), 2, 5, split="heldout", seed=1)
    assert not {problem.key for problem in kept} & {problem.key for problem in held}


def test_a_solver_that_fails_and_a_verifier_that_takes_anything_are_found_out() -> None:
    problem = TICKETS.problem_at(0, "train", 0, 1, 0.1)
    assert asyncio.run(is_sound(TicketsEnvironment(), problem))
    assert not asyncio.run(is_sound(Lazy(), problem))
    assert not asyncio.run(is_sound(Generous(), problem))
    assert collect(Lazy(), 1, 5) == collect(Generous(), 1, 5) == []


def test_only_what_a_random_policy_sometimes_solves_is_kept() -> None:
    tried, policy = random_policy(0)
    kept = collect(TicketsEnvironment(), 1, 100, policy=policy, k=40, most=40)
    assert 0 < len(kept) < 40, len(kept)
    counts = {key: tried.count(key) for key in set(tried)}
    assert len(counts) == 40 and max(counts.values()) == 40  # the unsolved had all their attempts
    assert all(counts[problem.key] <= 40 for problem in kept) and min(counts.values()) < 40
    assert collect(TicketsEnvironment(), 4, 100, policy=random_policy(0)[1], k=10, most=15) == []


def test_attempts_end_with_the_first_that_succeeds() -> None:
    problem = TICKETS.problem_at(0, "train", 0, 1, 0.1)
    for outcomes, k, expected in (([0, 0, 1, 1], 4, (True, 3)), ([0, 0, 1], 2, (False, 2)), ([1], 1, (True, 1))):
        left = iter(outcomes)
        asked = 0

        async def attempt(_: EnvProblem, left: object = left) -> bool:
            nonlocal asked
            asked += 1
            return bool(next(left))  # type: ignore[call-overload]

        assert (asyncio.run(passes_at(problem, attempt, k)), asked) == expected
