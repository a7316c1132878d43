"""From samples to what is trained on: grades, rewards, and advantages inside each group.

A group with a failed grade is left out whole and counted: its mean would lean on fewer samples, and a failure is no
reward 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from conf.schema import RLConfig
from rl.advantage import group_advantages
from rl.messages import Sample
from rl.rewards import Attempt, part_names, total_reward
from rl.rewards.pool import RewardPool


@dataclass
class Experience:
    """One iteration's samples on this rank. `advantages` belongs to `trained`, one each."""

    samples: list[Sample]  # all of them, as graded
    trained: list[Sample] = field(default_factory=list)  # those of whole groups
    advantages: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # why grades failed
    failed_groups: int = 0
    zero_spread_groups: int = 0

    def advantage_of(self, sample: Sample) -> float | None:
        """None for a sample of a dropped group."""
        return next((a for s, a in zip(self.trained, self.advantages, strict=True) if s is sample), None)


def grade(samples: Sequence[Sample], pool: RewardPool, rl: RLConfig) -> tuple[list[Sample], list[str]]:
    """-> (the samples with their rewards, the reasons of failed grades). A failed sample keeps reward None."""
    attempts = [
        Attempt(
            prompt=sample.request.prompt,
            answer=sample.request.answer,
            text=sample.text,
            num_tokens=sample.num_sampled,
            max_tokens=rl.max_new_tokens,
            finished=sample.finish_reason == "stop",
        )
        for sample in samples
    ]
    grades = pool.grade(attempts, part_names(rl))
    graded = [
        sample
        if given.parts is None
        else replace(sample, reward_parts=given.parts, reward=total_reward(given.parts, rl))
        for sample, given in zip(samples, grades, strict=True)
    ]
    return graded, [given.error or "no reason given" for given in grades if given.parts is None]


def judge(samples: Sequence[Sample], failures: Sequence[str], rl: RLConfig) -> Experience:
    """Groups the graded samples by prompt and gives each its advantage."""
    found = Experience(list(samples), failures=list(failures))
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.request.prompt_index, []).append(sample)
    for group in groups.values():
        rewards = [sample.reward for sample in group if sample.reward is not None]
        if len(rewards) < len(group):
            found.failed_groups += 1
            continue
        values, zero_spread = group_advantages(torch.tensor([rewards], dtype=torch.float64), rl.advantage_std)
        found.zero_spread_groups += int(zero_spread)
        found.trained += group
        found.advantages += values[0].tolist()
    return found
