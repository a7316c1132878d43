"""Rules by name: the parts that worker processes compute, each a pure function `(Attempt) -> float`.

Apart from the package's `__init__`, because every worker starts with this import: the standard library, math-verify
and data/tasks.
"""

from __future__ import annotations

from collections.abc import Callable

from rl.rewards.attempt import Attempt
from rl.rewards.exact_match import exact_match
from rl.rewards.format import well_formed
from rl.rewards.language import language_share
from rl.rewards.length import length_share
from rl.rewards.math_equal import math_equal
from rl.rewards.task import by_task

REWARDS: dict[str, Callable[[Attempt], float]] = {
    "exact_match": exact_match,
    "math_verify": math_equal,
    "format": well_formed,
    "length": length_share,
    "language": language_share,
    "task": by_task,
}
