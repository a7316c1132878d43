"""Length penalties: how much of the budget, linear or near its end alone, or against the rest of the group.

`length_share` is a part of every reward and what `linear` and `soft_overlong` are made of. DeepSeek-V3.2 names a
length penalty and gives no formula; linear over the budget is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from rl.rewards.attempt import Attempt


def length_share(attempt: Attempt) -> float:
    """The share of the token budget that was used."""
    return attempt.num_tokens / attempt.max_tokens


def soft_overlong(num_tokens: float, max_tokens: int, cache: int) -> float:
    """0 up to `max_tokens - cache` tokens, from there linear down to -1 at `max_tokens` (DAPO, arXiv 2503.14476,
    eq. 13)."""
    return -min(1.0, max(0.0, num_tokens - (max_tokens - cache)) / cache)


def group_relative(lengths: Sequence[int], outcomes: Sequence[float]) -> list[float]:
    """The length reward of each sample of one prompt, in [-0.5, 0.5] (Kimi k1.5, arXiv 2501.12599, sec. 2.3.3).

    lambda_i = 0.5 - (len_i - min len) / (max len - min len); a right answer gets lambda, a wrong one min(0, lambda);
    all get 0 where the lengths are equal. Two departures, both nothing where outcomes are 0 and 1 and one is 1: an
    outcome between counts by its share, and the negative side is scaled by the group's best outcome, because a group
    without a right answer does not show how many tokens one needs.
    """
    assert len(lengths) == len(outcomes), (lengths, outcomes)
    if not lengths or max(lengths) == min(lengths):
        return [0.0] * len(lengths)
    shortest, spread, best = min(lengths), max(lengths) - min(lengths), max(outcomes)
    shares = [0.5 - (length - shortest) / spread for length in lengths]
    return [outcome * max(0.0, s) + best * min(0.0, s) for s, outcome in zip(shares, outcomes, strict=True)]
