"""The one way in which an environment draws its problems: again and again until one lies in the wanted split."""

from __future__ import annotations

import random
from collections.abc import Callable

from conf.errors import UserError
from data.split import in_split
from data.tasks.task import MAX_DRAWS
from rl.env.environment import EnvProblem


def draw(
    name: str,
    make: Callable[[random.Random, int], EnvProblem | None],
    index: int,
    split: str,
    seed: int,
    level: int,
    share: float,
) -> EnvProblem:
    """Problem `index`, a function of the arguments alone. `make`: a draw of one problem of a level (None: draw again).

    UserError where the split has (next to) no problem of that level.
    """
    for number in range(MAX_DRAWS):
        problem = make(random.Random(f"{name}/{split}/{seed}/{level}/{index}/{number}"), level)
        if problem is not None and in_split(problem.key, split, share):
            return problem
    raise UserError(f"data.heldout={share:g} leaves no {name}:{level} in the {split} split: give a share nearer to 0.1")
