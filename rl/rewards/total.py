"""Parts -> the reward of a sample.

Parts are raw numbers in [0, 1] (`length_relative`: in [-0.5, 0.5]); which there are and how they add up is the run's
configuration. docs/rewards.md has the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rl.rewards.length import group_relative, soft_overlong

if TYPE_CHECKING:
    from conf.schema import RLConfig


def rule_parts(rl: RLConfig) -> tuple[str, ...]:
    """The parts that worker processes compute (`rl/rewards/rules.py`)."""
    outcome = () if rl.outcome in ("judge", "proof", "environment") else (rl.outcome,)
    return (*outcome, "format", "length", *(("language",) if rl.language != "none" else ()))


def part_names(rl: RLConfig) -> tuple[str, ...]:
    """The parts that the rewards of a run are made of, in all its domains; an outcome comes first. A sample has those
    of its domain, and `judge` beside another outcome only where its row has a rubric."""
    return tuple(dict.fromkeys(name for view in rl.views for name in _parts_of(view)))


def _parts_of(rl: RLConfig) -> tuple[str, ...]:
    judged = {
        "environment": ("environment",),
        "judge": ("judge",),
        "proof": ("proof", "proof_verified", "proof_analysis"),
    }.get(rl.outcome, ())
    beside = ("judge",) if rl.judge_weight > 0 else ()
    relative = ("length_relative",) if rl.length_shape == "group_relative" else ()
    return (*judged, *rule_parts(rl), *beside, *relative)


def relative_lengths(group: Sequence[tuple[int, Mapping[str, float]]], rl: RLConfig) -> list[dict[str, float]]:
    """The part that only the whole group gives, `length_relative`: (tokens, parts) of each sample -> what to add."""
    if rl.length_shape != "group_relative":
        return [{} for _ in group]
    found = group_relative([tokens for tokens, _ in group], [parts[rl.outcome] for _, parts in group])
    return [{"length_relative": value} for value in found]


def with_length(outcome: float, parts: Mapping[str, float], rl: RLConfig) -> float:
    """The outcome with the length penalty on it, by `rl.length_shape`, p the strength `rl.length_penalty`:

    linear          outcome x (1 - p x share of the budget used)
    soft_overlong   outcome x (1 + p x R), R in [-1, 0] (`soft_overlong`)
    group_relative  outcome + p x R, R in [-0.5, 0.5] (`group_relative`)

    A wrong answer must not gain by being short: a penalty on it pays for being wrong in fewer tokens, and a policy that
    seldom succeeds then learns to say nothing. The first two multiply the outcome, so a wrong answer has nothing to
    lose; DAPO adds its R to every answer, this departs from it. The third gives a wrong answer at most 0, and nothing
    at all in a group where none is right. Beside a right answer a wrong one of the longer half does lose, as Kimi k1.5
    has it: down to the middle of the group, and no further, being shorter costs it less.
    """
    p = rl.length_penalty
    if rl.length_shape == "group_relative":
        return outcome + p * parts["length_relative"]
    if rl.length_shape == "soft_overlong":
        num_tokens = round(parts["length"] * rl.max_new_tokens)
        return outcome * (1.0 + p * soft_overlong(num_tokens, rl.max_new_tokens, rl.overlong_cache))
    return outcome * (1.0 - p * parts["length"])


def reward_terms(parts: Mapping[str, float], rl: RLConfig) -> dict[str, float]:
    """What the reward is the sum of, by part: the outcome with its length penalty, then the weights of format, language
    and judge times these parts."""
    terms = {rl.outcome: with_length(parts[rl.outcome], parts, rl), "format": rl.format_weight * parts["format"]}
    if rl.language != "none":
        terms["language"] = rl.language_weight * parts["language"]
    if rl.judge_weight > 0 and "judge" in parts:  # a row without rubric: the same for the whole group
        terms["judge"] = rl.judge_weight * parts["judge"]
    return terms


def total_reward(parts: Mapping[str, float], rl: RLConfig) -> float:
    """The reward of a sample with these parts."""
    return sum(reward_terms(parts, rl).values())
