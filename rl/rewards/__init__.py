"""Reward parts by name. A part is a pure function `(Attempt) -> float`; `rl/rewards/pool.py` runs it in a process
that can be killed.

Parts are raw numbers in [0, 1]; `part_weights` says what each adds to the reward. Only the standard library and
math-verify are imported here, since every worker process starts with this import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rl.rewards.attempt import Attempt, extract_answer
from rl.rewards.exact_match import exact_match
from rl.rewards.format import well_formed
from rl.rewards.length import length_share
from rl.rewards.math_equal import math_equal

if TYPE_CHECKING:
    from conf.schema import RLConfig

__all__ = ["REWARDS", "Attempt", "extract_answer", "part_weights"]

REWARDS: dict[str, Callable[[Attempt], float]] = {
    "exact_match": exact_match,
    "math_verify": math_equal,
    "format": well_formed,
    "length": length_share,
}


def part_weights(rl: RLConfig) -> dict[str, float]:
    """What each part of this run's reward counts: outcome 1, format as configured, length as a loss."""
    return {rl.outcome: 1.0, "format": rl.format_weight, "length": -rl.length_penalty}
