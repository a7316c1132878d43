"""Length penalties by hand-worked numbers, and what each shape leaves a wrong answer."""

import pytest

from conf.schema import RLConfig
from rl.groups import grade, judge
from rl.rewards import part_names, total_reward
from rl.rewards.length import group_relative, soft_overlong
from rl.rewards.pool import Grade
from tests.rl.samples import make_sample
from tests.rl.test_groups import FakePool


def test_soft_overlong_by_hand():
    """DAPO's own numbers: 16,384 expected tokens and a cache of 4,096 under a maximum of 20,480."""
    lengths = (1, 16384, 16385, 17408, 18432, 20480, 30000)
    found = [soft_overlong(length, 20480, 4096) for length in lengths]
    assert found == [0.0, 0.0, -1 / 4096, -0.25, -0.5, -1.0, -1.0]


def test_group_relative_by_hand():
    """lambda of lengths 10, 20, 30, 50 is 0.5, 0.25, 0, -0.5."""
    lengths = [10, 20, 30, 50]
    assert group_relative(lengths, [1, 1, 1, 1]) == [0.5, 0.25, 0.0, -0.5]
    assert group_relative(lengths, [0, 0, 0, 1]) == [0.0, 0.0, 0.0, -0.5]
    assert group_relative(lengths, [1, 0, 1, 0]) == [0.5, 0.0, 0.0, -0.5]
    assert group_relative(lengths, [0.5, 0.0, 0.0, 0.5]) == [0.25, 0.0, 0.0, -0.25]
    assert group_relative([7, 7, 7], [1, 0, 1]) == [0.0, 0.0, 0.0]
    assert group_relative([], []) == []


@pytest.mark.parametrize("shape", ["linear", "soft_overlong", "group_relative"])
def test_a_wrong_answer_gains_nothing_by_being_short(shape: str):
    """In no shape does a wrong answer get more than no penalty; where none is right, length makes no difference."""
    rl = RLConfig(length_shape=shape, length_penalty=0.4, max_new_tokens=40, overlong_cache=20)
    lengths = [4, 12, 30, 40]
    relative = group_relative(lengths, [0, 0, 0, 0])
    wrong = [
        {"exact_match": 0.0, "format": 0.0, "length": n / 40, "length_relative": r}
        for n, r in zip(lengths, relative, strict=True)
    ]
    assert [total_reward(parts, rl) for parts in wrong] == [0.0] * 4
    beside_a_right_one = group_relative([*lengths, 20], [0, 0, 0, 0, 1])
    assert max(beside_a_right_one[:-1]) == 0.0


def test_the_reward_of_a_soft_overlong_answer():
    rl = RLConfig(length_shape="soft_overlong", length_penalty=0.4, max_new_tokens=40, overlong_cache=20)
    rewards = [total_reward({"exact_match": 1.0, "format": 0.0, "length": n / 40}, rl) for n in (20, 21, 30, 40)]
    assert rewards == pytest.approx([1.0, 1 - 0.4 / 20, 0.8, 0.6])


def test_group_relative_is_taken_inside_each_group():
    """Lengths 2, 4, 6 of one prompt, all right but the last: lambda 0.5, 0, -0.5; another prompt's lengths do not
    matter, nor does a sample whose grade failed. One sample alone has no group to be compared with."""
    rl = RLConfig(length_shape="group_relative", length_penalty=0.2, max_new_tokens=10)
    lengths = [(0, 2), (0, 4), (1, 9), (0, 6), (2, 3), (2, 5), (2, 8)]
    samples = [make_sample([1], [2] * n, [0.0] * n, prompt_index=p, sample_index=s) for s, (p, n) in enumerate(lengths)]
    grades = [Grade({"exact_match": right, "format": 0.0, "length": 0.5}) for right in (1.0, 1.0, 1.0, 0.0, 1.0, 1.0)]
    graded, failures = grade(samples, FakePool([*grades, Grade(None, "no")]), rl)  # type: ignore[arg-type]
    assert failures == ["no"]
    assert [s.reward for s in graded] == pytest.approx([1.1, 1.0, 1.0, -0.1, 1.1, 0.9, None])
    assert graded[3].reward_parts["length_relative"] == -0.5 and part_names(rl)[-1] == "length_relative"
    found = judge(graded, failures, rl)
    assert found.failed_groups == 1 and [s.request.prompt_index for s in found.trained] == [0, 0, 0, 1]
