"""What an iteration's rollouts came to: sums on each rank, added over ranks, then turned into means for
metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TypeVar

import torch

from rl.groups import Experience
from train import distributed

T = TypeVar("T")


def add_over_ranks(sums: Mapping[str, float]) -> dict[str, float]:
    """The same keys, each summed over ranks in one collective; every rank gives the same keys."""
    names = sorted(sums)
    held = torch.tensor([float(sums[name]) for name in names], dtype=torch.float64, device=distributed.device())
    return dict(zip(names, distributed.sum_over_ranks(held).tolist(), strict=True))


def of_all_ranks(mine: list[T]) -> list[T]:
    """The lists of all ranks, one after another."""
    return list(chain.from_iterable(distributed.gather_objects(mine)))


def experience_sums(experience: Experience, parts: Iterable[str]) -> dict[str, float]:
    """Counts and sums over this rank's samples; `parts` are the names of the reward's parts."""
    samples = experience.samples
    graded = [sample for sample in samples if sample.reward is not None]
    return {
        "samples": len(samples),
        "graded": len(graded),
        "groups": len({sample.request.prompt_index for sample in samples}),
        "failed_groups": experience.failed_groups,
        "zero_spread_groups": len(experience.zero_spread),
        "sampled_tokens": sum(sample.num_sampled for sample in samples),
        "tokens": sum(len(sample.tokens) for sample in samples),
        "missing_logprobs": sum(math.isnan(p) for sample in samples for p in sample.tokens.behaviour_logprobs),
        "truncated": sum(sample.finish_reason == "length" for sample in samples),
        "reward": sum(sample.reward or 0.0 for sample in graded),
        **{f"part/{name}": sum(sample.reward_parts.get(name, 0.0) for sample in graded) for name in parts},
        **{f"parted/{name}": sum(name in sample.reward_parts for sample in graded) for name in parts},
    }


def experience_metrics(sums: Mapping[str, float], rollout_seconds: float) -> dict[str, float]:
    """Means over all ranks; rewards are NaN where no grade came, a part's mean is over the
    samples that have it. `rollout_seconds`: of the slowest rank."""
    samples, graded, groups = sums["samples"], sums["graded"] or math.nan, sums["groups"]
    parts = {name.removeprefix("part/"): value for name, value in sums.items() if name.startswith("part/")}
    return {
        "reward/mean": sums["reward"] / graded,
        **{f"reward/{name}": value / (sums[f"parted/{name}"] or math.nan) for name, value in parts.items()},
        **{name: value for name, value in sums.items() if name.startswith("judge/")},
        "reward/failed_grades": samples - sums["graded"],
        "reward/failed_groups": sums["failed_groups"],
        "reward/zero_spread_frac": sums["zero_spread_groups"] / groups,
        "rollout/length_mean": sums["sampled_tokens"] / samples,
        "rollout/missing_logprobs": sums["missing_logprobs"],
        "rollout/truncated_frac": sums["truncated"] / samples,
        "rollout/tokens_per_s": sums["sampled_tokens"] / max(rollout_seconds, 1e-9),
    }


def off_policy_metrics(sequences: Sequence[tuple[float, bool]], delta: float | None) -> dict[str, float]:
    """How the measure of eq. 9 is spread over the iteration's sequences, of all ranks, so that a delta can be chosen.

    sequences: (mean log(pi_sampler / pi_theta) at its own mini-batch, whether A < 0) of each. Quantiles are linear
    between neighbours; `above_delta_frac` is the share of the sequences with A < 0. Empty where there are none.
    """
    if not sequences:
        return {}
    measure = torch.tensor([value for value, _ in sequences], dtype=torch.float64)
    marks = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    found = {f"policy/off_policy_kl_{name}": float(measure.quantile(at)) for name, at in marks.items()}
    negative = [value for value, is_negative in sequences if is_negative]
    if delta is not None and negative:
        found["policy/off_policy_above_delta_frac"] = sum(value > delta for value in negative) / len(negative)
    return found
