"""Which generated problems are worth training on (DeepSeek-V3.2, sec. 3.2.3): the scripted solution must pass the
verifier, doing nothing must fail it, and, where a policy is given, at least one of its k attempts must succeed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

from rl.env.environment import Environment, EnvProblem
from rl.env.traces import play

Policy = Callable[[EnvProblem], Awaitable[bool]]  # one attempt: whether it solved the problem


async def is_sound(environment: Environment, problem: EnvProblem) -> bool:
    """Whether the scripted solution is right by the verifier and an empty trajectory is not."""
    if (await play(environment, problem)).verdict < 1:
        return False
    tools = environment.tools(problem)
    try:
        return await environment.verify(problem, "", tools) < 1
    finally:
        for tool in tools:
            await tool.close()


async def passes_at(problem: EnvProblem, policy: Policy, k: int) -> bool:
    """Whether one of up to `k` attempts succeeds; the attempts end with the first that does."""
    for _ in range(k):
        if await policy(problem):
            return True
    return False


async def synthesise(
    environment: Environment,
    level: int,
    num: int,
    *,
    split: str = "train",
    seed: int = 0,
    share: float = 0.1,
    policy: Policy | None = None,
    k: int = 100,
    start: int = 0,
    most: int | None = None,
) -> AsyncIterator[EnvProblem]:
    """Up to `num` sound problems from number `start` on, each key once, looking at no more than `most` (10 x num)."""
    keys: set[str] = set()
    for index in range(start, start + (10 * num if most is None else most)):
        problem = environment.problem_at(index, split, seed, level, share)
        if problem.key in keys or not await is_sound(environment, problem):
            continue
        if policy is not None and not await passes_at(problem, policy, k):
            continue
        keys.add(problem.key)
        yield problem
        if len(keys) == num:
            return
