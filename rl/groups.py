"""From samples to what is trained on: grades, rewards, and advantages inside each group.

A group with a failed grade is left out whole and counted: its mean would lean on fewer samples, and a failure is no
reward 0. With dynamic sampling a group of equal rewards is left out as well, for one of another prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from conf.schema import RLConfig
from rl.advantage import group_advantages
from rl.messages import Sample, Trace
from rl.rewards import Attempt, total_reward
from rl.rewards.client import JudgeClient
from rl.rewards.judged import judge_grades
from rl.rewards.pool import Grade, RewardPool
from rl.rewards.total import relative_lengths, rule_parts


@dataclass
class Experience:
    """One iteration's samples on this rank. `advantages` belongs to `trained`, one each."""

    samples: list[Sample]  # all of them, as graded
    trained: list[Sample] = field(default_factory=list)  # those of the groups that are not left out
    advantages: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # why grades failed
    failed_groups: int = 0
    zero_spread: list[int] = field(default_factory=list)  # `prompt_index` of the groups whose rewards are all equal
    traces: dict[int, Trace] = field(default_factory=dict)  # place in `trained` -> what the update saw, of a few

    def leave_out(self, indices: Collection[int]) -> None:
        """Trains on no group of these `prompt_index`; they stay in `samples` and in what is counted."""
        kept = [
            (s, a) for s, a in zip(self.trained, self.advantages, strict=True) if s.request.prompt_index not in indices
        ]
        self.trained, self.advantages = [s for s, _ in kept], [a for _, a in kept]

    def add(self, more: Experience) -> None:
        """Takes in the groups of another round of the same iteration."""
        self.samples += more.samples
        self.trained += more.trained
        self.advantages += more.advantages
        self.failures += more.failures
        self.failed_groups += more.failed_groups
        self.zero_spread += more.zero_spread


def grade(
    samples: Sequence[Sample], pool: RewardPool, rl: RLConfig, client: JudgeClient | None = None
) -> tuple[list[Sample], list[str]]:
    """-> (the samples with their rewards, the reasons of failed grades). A failed sample keeps reward None.

    client: the judge, where a reward needs one; it is asked about samples that the rules could grade.
    """
    attempts = [attempt_of(sample, rl) for sample in samples]
    grades = pool.grade(attempts, [rule_parts(rl.of(attempt.domain)) for attempt in attempts])
    grades = [with_verdict(given, sample, rl) for given, sample in zip(grades, samples, strict=True)]
    if client is not None:
        whole_grades = [i for i, given in enumerate(grades) if given.parts is not None]
        judged = judge_grades([attempts[i] for i in whole_grades], client, rl)
        for i, given in zip(whole_grades, judged, strict=True):
            grades[i] = given if given.parts is None else Grade((grades[i].parts or {}) | given.parts)
    parts = [given.parts for given in grades]
    for group in _groups(samples):
        whole = [(i, found) for i in group if (found := parts[i]) is not None]
        of_domain = rl.of(samples[group[0]].request.domain)
        added = relative_lengths([(samples[i].num_sampled, found) for i, found in whole], of_domain)
        for (i, found), more in zip(whole, added, strict=True):
            parts[i] = found | more
    graded = [
        sample if found is None else _rewarded(sample, found, rl.of(sample.request.domain))
        for sample, found in zip(samples, parts, strict=True)
    ]
    return graded, [given.error or "no reason given" for given in grades if given.parts is None]


def with_verdict(given: Grade, sample: Sample, rl: RLConfig) -> Grade:
    """The grade with what the environment's verifier said of the sample, which may have failed as any grader may."""
    if given.parts is None or rl.of(sample.request.domain).outcome != "environment":
        return given
    if sample.verdict is None:
        return Grade(None, sample.verdict_error or f"{sample.request.env or 'no environment'} gave no verdict")
    return Grade({"environment": sample.verdict} | given.parts)


def _rewarded(sample: Sample, parts: Mapping[str, float], rl: RLConfig) -> Sample:
    return replace(sample, reward_parts=parts, outcome=parts[rl.outcome], reward=total_reward(parts, rl))


def attempt_of(sample: Sample, rl: RLConfig) -> Attempt:
    """What graders see of it."""
    request = sample.request
    return Attempt(
        prompt=request.prompt,
        answer=request.answer,
        text=sample.text,
        num_tokens=sample.num_sampled,
        max_tokens=request.max_new_tokens,
        finished=sample.finish_reason == "stop",
        rubric=request.rubric,
        language=rl.of(request.domain).language,
        domain=request.domain,
        task=request.task,
    )


def _groups(samples: Sequence[Sample]) -> list[list[int]]:
    """Places of the samples of each prompt."""
    groups: dict[int, list[int]] = {}
    for place, sample in enumerate(samples):
        groups.setdefault(sample.request.prompt_index, []).append(place)
    return list(groups.values())


def judge(samples: Sequence[Sample], failures: Sequence[str], rl: RLConfig) -> Experience:
    """Groups the graded samples by prompt and gives each its advantage."""
    found = Experience(list(samples), failures=list(failures))
    for group in ([samples[place] for place in places] for places in _groups(samples)):
        rewards = [sample.reward for sample in group if sample.reward is not None]
        if len(rewards) < len(group):
            found.failed_groups += 1
            continue
        values, zero_spread = group_advantages(torch.tensor([rewards], dtype=torch.float64), rl.advantage_std)
        found.zero_spread += [group[0].request.prompt_index] if zero_spread else []
        found.trained += group
        found.advantages += values[0].tolist()
    return found
