"""Advantages by hand, and groups that teach nothing."""

import torch

from rl.advantage import group_advantages


def test_mean_only():
    advantages, zero_spread = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 2.5]]))
    assert advantages.tolist() == [[0.5, -0.5, -0.5, 0.5], [-0.5, -0.5, -0.5, 1.5]]
    assert zero_spread.tolist() == [False, False]


def test_division_by_the_population_std():
    advantages, _ = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), divide_by_std=True)
    assert advantages.tolist() == [[1.0, -1.0, -1.0, 1.0]]


def test_equal_rewards_give_exact_zeros_and_are_marked():
    rewards = torch.tensor([[0.1] * 7, [0.1] * 6 + [0.2]])
    for divide in (False, True):
        advantages, zero_spread = group_advantages(rewards, divide)
        assert zero_spread.tolist() == [True, False]
        assert (advantages[0] == 0).all() and advantages.isfinite().all()
        assert advantages[1, -1] > 0
