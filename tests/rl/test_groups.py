"""A failed grade drops its group and is counted; whole groups get rewards and advantages."""

import math

import pytest

from conf.schema import RLConfig
from rl.groups import grade, judge
from rl.rewards import part_names
from rl.rewards.pool import Grade
from rl.summary import experience_metrics, experience_sums, off_policy_metrics
from tests.rl.samples import make_sample

RL = RLConfig(group_size=2, length_penalty=0.1, max_new_tokens=10)


class FakePool:
    """Answers with given grades and remembers what it was asked."""

    def __init__(self, grades: list[Grade]) -> None:
        self.grades = grades
        self.asked: list = []

    def grade(self, attempts: list, parts: list[str]) -> list[Grade]:
        self.asked = list(attempts)
        return self.grades


def parts(right: float, length: float = 0.5) -> Grade:
    return Grade({"exact_match": right, "format": 1.0, "length": length})


def test_failures_drop_their_group_and_never_count_as_zero():
    samples = [make_sample([1], [2] * 5, [0.0] * 5, prompt_index=p, sample_index=s) for p in range(3) for s in range(2)]
    broken = Grade(None, "no grade within 1 s")
    pool = FakePool([parts(1), parts(0), parts(1), broken, parts(1), parts(1)])
    graded, failures = grade(samples, pool, RL)  # type: ignore[arg-type]
    assert failures == ["no grade within 1 s"]
    assert [s.reward for s in graded] == pytest.approx([0.95, 0.0, 0.95, None, 0.95, 0.95])
    found = judge(graded, failures, RL)
    assert [s.request.prompt_index for s in found.trained] == [0, 0, 2, 2]
    assert found.advantages == pytest.approx([0.475, -0.475, 0.0, 0.0])
    assert (found.failed_groups, found.zero_spread) == (1, [2])

    row = experience_metrics(experience_sums(found, part_names(RL)), rollout_seconds=2.0)
    assert row["reward/mean"] == pytest.approx(4 * 0.95 / 5)
    assert row["reward/exact_match"] == pytest.approx(4 / 5)
    assert row["reward/length"] == pytest.approx(0.5)
    assert row["reward/failed_grades"] == 1 and row["reward/failed_groups"] == 1
    assert row["reward/zero_spread_frac"] == pytest.approx(1 / 3)
    assert row["rollout/length_mean"] == 5 and row["rollout/truncated_frac"] == 0
    assert row["rollout/tokens_per_s"] == pytest.approx(15.0)


def test_a_group_left_out_is_counted_but_not_trained_on():
    samples = [make_sample([1], [2] * 5, [0.0] * 5, prompt_index=p, sample_index=s) for p in range(2) for s in range(2)]
    first = judge(*grade(samples, FakePool([parts(1), parts(1), parts(1), parts(0)]), RL), RL)  # type: ignore[arg-type]
    first.leave_out(first.zero_spread)
    assert [s.request.prompt_index for s in first.trained] == [1, 1] and len(first.samples) == 4
    assert first.advantages == pytest.approx([0.475, -0.475])
    more = [make_sample([1], [2] * 5, [0.0] * 5, prompt_index=2, sample_index=s) for s in range(2)]
    first.add(judge(*grade(more, FakePool([parts(0), parts(1)]), RL), RL))  # type: ignore[arg-type]
    assert [s.request.prompt_index for s in first.trained] == [1, 1, 2, 2]
    assert first.advantages == pytest.approx([0.475, -0.475, -0.475, 0.475])
    row = experience_metrics(experience_sums(first, part_names(RL)), rollout_seconds=1.0)
    assert row["reward/zero_spread_frac"] == pytest.approx(1 / 3) and row["reward/mean"] == pytest.approx(4 * 0.95 / 6)


def test_missing_log_probs_are_counted():
    samples = [make_sample([1], [2, 3], [-1.0, math.nan], sample_index=s) for s in range(2)]
    found = judge(*grade(samples, FakePool([parts(1), parts(0)]), RL), RL)  # type: ignore[arg-type]
    row = experience_metrics(experience_sums(found, part_names(RL)), rollout_seconds=1.0)
    assert row["rollout/missing_logprobs"] == 2


def test_how_the_off_policy_measure_is_spread():
    """0, 0.01, ..., 1.00: the quantiles are what their names say; of the 50 odd ones with A < 0 25 lie above 0.5."""
    sequences = [(i / 100, i % 2 == 1) for i in reversed(range(101))]
    row = off_policy_metrics(sequences, 0.5)
    assert row == pytest.approx(
        {
            "policy/off_policy_kl_p50": 0.5,
            "policy/off_policy_kl_p90": 0.9,
            "policy/off_policy_kl_p99": 0.99,
            "policy/off_policy_kl_max": 1.0,
            "policy/off_policy_above_delta_frac": 0.5,
        }
    )
    assert "policy/off_policy_above_delta_frac" not in off_policy_metrics(sequences, None)
    assert off_policy_metrics([], 0.5) == {}


def test_what_a_grader_is_told():
    sample = make_sample([1, 2], [3, 4, 5], [0.0] * 3, text="</think>7", prompt="3+4=?", answer="7", max_new_tokens=10)
    pool = FakePool([parts(1)])
    grade([sample], pool, RL)  # type: ignore[arg-type]
    (attempt,) = pool.asked
    assert (attempt.prompt, attempt.answer, attempt.text) == ("3+4=?", "7", "</think>7")
    assert (attempt.num_tokens, attempt.max_tokens, attempt.finished) == (3, 10, True)


def test_where_no_grade_came_there_is_no_reward():
    broken = Grade(None, "KeyError: 'x'")
    samples = [make_sample([1], [2], [0.0], prompt_index=0, sample_index=s) for s in range(2)]
    found = judge(*grade(samples, FakePool([broken, broken]), RL), RL)  # type: ignore[arg-type]
    row = experience_metrics(experience_sums(found, part_names(RL)), rollout_seconds=1.0)
    assert math.isnan(row["reward/mean"]) and math.isnan(row["reward/exact_match"])
    assert row["reward/failed_grades"] == 2 and found.trained == []
