"""What an iteration's rollouts came to: sums on each rank, added over ranks, then turned into means for
metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TypeVar

import torch

from conf.schema import RLConfig
from rl.groups import Experience
from rl.messages import Sample
from rl.rewards import part_names
from train import distributed

T = TypeVar("T")
MAX_DOMAINS = 32


def add_over_ranks(sums: Mapping[str, float]) -> dict[str, float]:
    """The same keys, each summed over ranks in one collective; every rank gives the same keys."""
    names = sorted(sums)
    held = torch.tensor([float(sums[name]) for name in names], dtype=torch.float64, device=distributed.device())
    return dict(zip(names, distributed.sum_over_ranks(held).tolist(), strict=True))


def of_all_ranks(mine: list[T]) -> list[T]:
    """The lists of all ranks, one after another."""
    return list(chain.from_iterable(distributed.gather_objects(mine)))


def rollout_row(
    experience: Experience, rl: RLConfig, seconds: float, judge_counts: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """-> (the iteration's metrics of rollouts and rewards, the sums behind them), over all ranks, which all call it.

    seconds: of this rank's rollouts; judge_counts: what its judge was asked.
    """
    domains = domain_names(experience.samples, rl)
    own = experience_sums(experience, part_names(rl)) | dict(judge_counts)
    sums = add_over_ranks(own | domain_sums(experience, domains))
    row = experience_metrics(sums, distributed.max_over_ranks(seconds))
    if rl.needs_tools:
        row |= tool_metrics(add_over_ranks(tool_sums(experience.samples)))
    return row | domain_metrics(sums, domains), sums


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
        "tokens": sum(len(row) for sample in samples for row in sample.rows),
        "missing_logprobs": sum(
            math.isnan(p) for sample in samples for row in sample.rows for p in row.behaviour_logprobs
        ),
        "truncated": sum(sample.finish_reason != "stop" for sample in samples),
        "reward": sum(sample.reward or 0.0 for sample in graded),
        "outcome": sum(sample.outcome or 0.0 for sample in graded),
        **{f"part/{name}": sum(sample.reward_parts.get(name, 0.0) for sample in graded) for name in parts},
        **{f"parted/{name}": sum(name in sample.reward_parts for sample in graded) for name in parts},
    }


def tool_sums(samples: Sequence[Sample]) -> dict[str, float]:
    """Counts and sums over this rank's samples that were offered tools or an environment."""
    played = [sample for sample in samples if sample.said]
    calls = [call for sample in played for call in sample.calls]
    return {
        "played": len(played),
        "turns": sum(len(sample.said) for sample in played),
        "rows": sum(len(sample.rows) for sample in played),
        "calls": len(calls),
        "failed": sum(call.error for call in calls),
        "malformed": sum(sample.num_malformed for sample in played),
        "seconds": sum(call.seconds for call in calls),
        "calling": sum(bool(sample.calls) for sample in played),
        "resumed": sum(sample.resumed and bool(sample.calls) for sample in played),
        "no_turns": sum(sample.finish_reason == "turns" for sample in played),
        "no_context": sum(sample.finish_reason == "context" for sample in played),
    }


def tool_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """`tool/*`, means over trajectories and over calls; NaN over none. `tool/resumed_frac`: of the trajectories that
    called a tool, those that thought on after a result."""
    played, calls = sums["played"] or math.nan, sums["calls"] or math.nan
    return {
        "tool/turns_mean": sums["turns"] / played,
        "tool/rows_mean": sums["rows"] / played,
        "tool/calls_mean": sums["calls"] / played,
        "tool/calling_frac": sums["calling"] / played,
        "tool/resumed_frac": sums["resumed"] / (sums["calling"] or math.nan),
        "tool/error_frac": sums["failed"] / calls,
        "tool/malformed_mean": sums["malformed"] / played,
        "tool/seconds_mean": sums["seconds"] / calls,
        "tool/turns_exceeded_frac": sums["no_turns"] / played,
        "tool/context_exceeded_frac": sums["no_context"] / played,
    }


def staleness_metrics(experience: Experience, carried: int, version: int) -> dict[str, float]:
    """How many samples go on later (`carried` of this rank's), and by how many iterations the weights that drew the
    tokens trained on are older than `version`, in the mean; NaN over none. All ranks call it."""
    ages = [version - by for sample in experience.trained for by in sample.drawn_by]
    sums = add_over_ranks({"carried": carried, "tokens": len(ages), "age": sum(ages)})
    return {"rollout/carried": sums["carried"], "rollout/staleness_mean": sums["age"] / (sums["tokens"] or math.nan)}


def age_metrics(experience: Experience, version: int, groups: Mapping[str, float]) -> dict[str, float]:
    """`staleness/*`: by how many iterations the weights that drew the tokens trained on are older than `version`, and
    the share of the samples that several versions drew; NaN over none. `async/*`: `groups` of all ranks, which all call
    it."""
    drawn = [[version - by for by in sample.drawn_by] for sample in experience.trained]
    own = {"tokens": sum(map(len, drawn)), "age": sum(map(sum, drawn)), "samples": len(drawn)}
    sums = add_over_ranks(own | {"mixed": sum(len(set(ages)) > 1 for ages in drawn)} | dict(groups))
    oldest = distributed.max_over_ranks(max((age for ages in drawn for age in ages), default=-math.inf))
    return {
        "staleness/mean": sums["age"] / (sums["tokens"] or math.nan),
        "staleness/max": oldest if sums["tokens"] else math.nan,
        "staleness/mixed_frac": sums["mixed"] / (sums["samples"] or math.nan),
        **{f"async/{name}": sums[name] for name in groups},
    }


def experience_metrics(sums: Mapping[str, float], rollout_seconds: float) -> dict[str, float]:
    """Means over all ranks; NaN over no samples and for rewards where no grade came, a part's mean is over the samples
    that have it. `rollout_seconds`: of the slowest rank; where nothing was drawn in them there is no rate."""
    samples, graded, groups = sums["samples"], sums["graded"] or math.nan, sums["groups"]
    parts = {name.removeprefix("part/"): value for name, value in sums.items() if name.startswith("part/")}
    return {
        "reward/mean": sums["reward"] / graded,
        **{f"reward/{name}": value / (sums[f"parted/{name}"] or math.nan) for name, value in parts.items()},
        **{name: value for name, value in sums.items() if name.startswith("judge/")},
        "reward/failed_grades": samples - sums["graded"],
        "reward/failed_groups": sums["failed_groups"],
        "reward/zero_spread_frac": sums["zero_spread_groups"] / (groups or math.nan),
        "rollout/length_mean": sums["sampled_tokens"] / (samples or math.nan),
        "rollout/missing_logprobs": sums["missing_logprobs"],
        "rollout/truncated_frac": sums["truncated"] / (samples or math.nan),
        **({"rollout/tokens_per_s": sums["sampled_tokens"] / rollout_seconds} if rollout_seconds else {}),
    }


def domain_names(samples: Sequence[Sample], rl: RLConfig) -> list[str]:
    """The domains that metrics are told apart by, the same on all ranks: all of them, where there are several and
    at most MAX_DOMAINS; else those that `rl.domains` names."""
    found = sorted(set(of_all_ranks(sorted({sample.request.domain for sample in samples}))) | set(rl.domains))
    if len(found) > MAX_DOMAINS:
        return sorted(rl.domains)
    return found if len(found) > 1 else []


def domain_sums(experience: Experience, domains: Iterable[str]) -> dict[str, float]:
    """Counts and sums over this rank's samples of each domain."""
    found: dict[str, float] = {}
    equal = set(experience.zero_spread)
    for name in domains:
        samples = [sample for sample in experience.samples if sample.request.domain == name]
        groups = {sample.request.prompt_index for sample in samples}
        sums = {
            "samples": len(samples),
            "graded": sum(sample.reward is not None for sample in samples),
            "reward": sum(sample.reward or 0.0 for sample in samples),
            "outcome": sum(sample.outcome or 0.0 for sample in samples),
            "sampled_tokens": sum(sample.num_sampled for sample in samples),
            "truncated": sum(sample.finish_reason != "stop" for sample in samples),
            "groups": len(groups),
            "equal": len(groups & equal),
        }
        found |= {f"domain/{name}/{key}": float(value) for key, value in sums.items()}
    return found


def domain_metrics(sums: Mapping[str, float], domains: Iterable[str]) -> dict[str, float]:
    """`domain/NAME/...` of the domains that have samples; `sums`: `domain_sums` of all ranks."""
    found: dict[str, float] = {}
    for at in (f"domain/{name}" for name in domains):
        samples, graded = sums[f"{at}/samples"], sums[f"{at}/graded"]
        if samples:
            found |= {
                f"{at}/samples": samples,
                f"{at}/length_mean": sums[f"{at}/sampled_tokens"] / samples,
                f"{at}/truncated_frac": sums[f"{at}/truncated"] / samples,
                f"{at}/zero_spread_frac": sums[f"{at}/equal"] / sums[f"{at}/groups"],
            }
        if graded:
            found |= {f"{at}/reward": sums[f"{at}/reward"] / graded, f"{at}/accuracy": sums[f"{at}/outcome"] / graded}
    return found


def domain_kl(sequences: Sequence[tuple[str, float]], domains: Iterable[str]) -> dict[str, float]:
    """`domain/NAME/kl_ref`: mean over a domain's sequences, (domain, KL to the reference) each."""
    of = {name: [kl for domain, kl in sequences if domain == name] for name in domains}
    return {f"domain/{name}/kl_ref": sum(values) / len(values) for name, values in of.items() if values}


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
