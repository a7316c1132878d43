"""Confidence intervals of what `evaluate` measures: Student's t over sequences, and Newcombe's for two shares.

Tokens of one sequence are correlated (a document that a model finds hard is hard throughout), so the sequence is the
unit: a mean over tokens is the ratio of two sums over sequences, and its variance comes from how the sequences differ
(linearised, cluster-robust; Cochran, Sampling Techniques, ch. 6 and 9A). Two models on the same tokens are compared by
their differences within each sequence, from which the hardness of the text cancels.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

from torch import Tensor

LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate and its bounds; None where one sequence, or none, has such tokens, or the estimate is not finite."""

    mean: float
    low: float | None
    high: float | None


def t_cdf(t: float, freedom: int) -> float:
    """P(T <= t) of Student's t with a whole number of degrees of freedom (Abramowitz and Stegun, 26.7.3-26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    cosine, odd = math.cos(angle) ** 2, freedom % 2
    term = total = 1.0
    for i in range(2 + odd, freedom, 2):
        term *= cosine * (i - 1) / i
        total += term
    if odd:
        inside = 2 / math.pi * (angle + (math.sin(angle) * math.cos(angle) * total if freedom > 1 else 0.0))
    else:
        inside = math.sin(angle) * total
    return (1 + inside) / 2


def t_quantile(share: float, freedom: int) -> float:
    """The t >= 0 that T stays below with probability `share` >= 1/2."""
    if freedom > 2000:  # the same to four digits
        return NormalDist().inv_cdf(share)
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < share:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def mean_interval(sums: Tensor, counts: Tensor, level: float = LEVEL) -> Interval:
    """sums, counts [N]: of each sequence -> its mean over all tokens, with bounds where two sequences or more have any.
    Exactly equal models have the interval [0, 0]."""
    having = counts > 0
    sums, counts = sums[having].double(), counts[having].double()
    total, units = float(counts.sum()), len(counts)
    if not units:
        return Interval(math.nan, None, None)
    mean = float(sums.sum()) / total
    if units == 1 or not math.isfinite(mean):
        return Interval(mean, None, None)
    left = sums - mean * counts
    error = math.sqrt(float((left * left).sum()) * units / (units - 1)) / total
    reach = t_quantile((1 + level) / 2, units - 1) * error
    return Interval(mean, mean - reach, mean + reach)


def wilson(right: int, n: int, z: float) -> tuple[float, float]:
    """Wilson's score interval of a share, `z` standard deviations wide on either side."""
    share, wide = right / n, z * z / n
    middle = (share + wide / 2) / (1 + wide)
    reach = math.sqrt(wide * (share * (1 - share) + wide / 4)) / (1 + wide)
    return middle - reach, middle + reach


def share_difference(first: int, second: int, n: int, level: float = LEVEL) -> Interval:
    """second/n - first/n, each of n problems, by Newcombe's hybrid score (method 10, 1998), which holds at shares of 0
    and 1. The problems count as independent draws, so for two models on the same ones it is on the wide side."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    (low_1, high_1), (low_2, high_2) = wilson(first, n, z), wilson(second, n, z)
    one, two = first / n, second / n
    low = two - one - math.hypot(two - low_2, high_1 - one)
    high = two - one + math.hypot(high_2 - two, one - low_1)
    return Interval(two - one, low, high)
