"""Reward parts by name. A part is a pure function `(Attempt) -> float`; `rl/rewards/pool.py` runs it in a process
that can be killed.

Parts are raw numbers in [0, 1]; `total_reward` makes the reward of them. Only the standard library and
math-verify are imported here, since every worker process starts with this import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rl.rewards.attempt import Attempt, extract_answer
from rl.rewards.exact_match import exact_match
from rl.rewards.format import well_formed
from rl.rewards.length import length_share
from rl.rewards.math_equal import math_equal

if TYPE_CHECKING:
    from conf.schema import RLConfig

__all__ = ["REWARDS", "Attempt", "extract_answer", "part_names", "total_reward"]

REWARDS: dict[str, Callable[[Attempt], float]] = {
    "exact_match": exact_match,
    "math_verify": math_equal,
    "format": well_formed,
    "length": length_share,
}


def part_names(rl: RLConfig) -> tuple[str, ...]:
    """The parts that this run's reward is made of; the outcome comes first."""
    return (rl.outcome, "format", "length")


def total_reward(parts: Mapping[str, float], rl: RLConfig) -> float:
    """outcome x (1 - length_penalty x share of the budget used) + format_weight x format.

    A wrong answer has nothing to lose: a penalty on it pays for being wrong in fewer tokens, and a policy that seldom
    succeeds then learns to say nothing.
    """
    outcome = parts[rl.outcome] * (1.0 - rl.length_penalty * parts["length"])
    return outcome + rl.format_weight * parts["format"]
