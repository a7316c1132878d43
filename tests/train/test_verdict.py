"""Intervals against known values and by simulation, and what the verdict makes of them."""

from __future__ import annotations

import pytest
import torch

from train.intervals import mean_interval, share_difference, t_cdf, t_quantile, wilson
from train.verdict import enough_topk, loss_verdict, tasks_verdict, verdict


@pytest.mark.parametrize(
    ("freedom", "share", "value"),  # printed tables
    [(1, 0.975, 12.706), (2, 0.975, 4.3027), (3, 0.95, 2.3534), (10, 0.975, 2.2281), (31, 0.995, 2.7440)]
    + [(1000, 0.975, 1.9623), (5000, 0.975, 1.9600)],
)
def test_t_quantiles(freedom: int, share: float, value: float) -> None:
    assert t_quantile(share, freedom) == pytest.approx(value, abs=6e-4)
    assert t_cdf(value, freedom) == pytest.approx(share, abs=1e-4)


def test_an_interval_of_equal_counts_is_students() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 9.0])
    found = mean_interval(10 * values, torch.full((4,), 10.0))
    reach = 3.1824 * float(values.std()) / 2
    assert found.mean == 4.0
    assert (found.low, found.high) == (pytest.approx(4 - reach, abs=1e-3), pytest.approx(4 + reach, abs=1e-3))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Sequences of unequal length whose tokens share an effect: an interval over tokens would be far too narrow."""
    generator = torch.Generator().manual_seed(0)
    hits, tries = 0, 1500
    for _ in range(tries):
        counts = torch.randint(20, 200, (16,), generator=generator).double()
        effect = torch.randn(16, generator=generator)
        noise = torch.randn(16, generator=generator) * counts.sqrt()
        found = mean_interval(counts * effect + noise, counts)
        assert found.low is not None and found.high is not None
        hits += found.low <= 0 <= found.high
    assert 0.92 < hits / tries < 0.97


def test_too_few_sequences_have_no_interval() -> None:
    one = mean_interval(torch.tensor([3.0, 0.0]), torch.tensor([2.0, 0.0]))
    assert (one.mean, one.low, one.high) == (1.5, None, None)
    same = mean_interval(torch.zeros(3), torch.ones(3))
    assert same == (0.0, 0.0, 0.0)


def test_shares() -> None:
    assert wilson(0, 10, 1.959964)[1] == pytest.approx(0.2775, abs=1e-4)  # Wilson, printed
    found = share_difference(56, 48, 70)  # Newcombe 1998, table II, with the two samples of 70 and 80 as 70 each
    assert found.mean == pytest.approx(-8 / 70) and found.low is not None and found.high is not None
    assert found.low < -8 / 70 < found.high
    assert share_difference(20, 20, 20).mean == 0 and share_difference(20, 20, 20).low == pytest.approx(
        -0.161, abs=1e-3
    )


def row(start: int, end: int, low: float | None, high: float | None) -> dict:
    return {"from": start, "to": end, "low_all": low, "high_all": high, "difference": 0.5 * ((low or 0) + (high or 0))}


def test_buckets_depart_hold_or_are_undecided() -> None:
    rows = [row(1, 16, -0.001, 0.001), row(17, 32, -0.01, 0.02), row(33, 64, 0.02, 0.03), row(65, 128, None, None)]
    found = loss_verdict([*rows, row(129, 256, -0.5, -0.2)], 0.01)
    assert found == {
        "departs_at": 33,
        "holds_up_to": 16,
        "departs_in": [[33, 64]],
        "undecided_in": [[17, 32], [65, 128]],
        "better_in": [[129, 256]],
        "not_finite_in": [],
    }
    words = verdict({"loss_by_position": rows[:2]}, 0.01)["words"]
    assert "too few sequences to tell at 17 to 32" in words and "up to 16" in words
    assert verdict({}, 0.01)["words"] == ""


def test_losses_that_are_not_finite_are_no_verdict() -> None:
    assert mean_interval(torch.tensor([1.0, float("nan"), 2.0]), torch.ones(3))[1:] == (None, None)
    broken = row(17, 32, None, None) | {"difference": None}
    words = verdict({"loss_by_position": [row(1, 16, -0.001, 0.001), broken]}, 0.01)["words"]
    assert words == "Nothing is said of dense attention: losses are not finite at 17 to 32 tokens of context."
    parity = {"up_to": 512, "difference": None, "low": None, "high": None}
    assert "undecided (losses are not finite)" in verdict({"short_context": parity}, 0.01)["words"]


def task(length: int, dense: int, sparse: int, name: str = "needle", depth: float = 0.0, n: int = 50) -> dict:
    return {"task": name, "length": length, "depth": depth, "n": n, "dense": dense, "sparse": sparse}


def test_tasks_are_compared_where_dense_can_do_them() -> None:
    rows = [task(1024, 50, 49), task(1024, 48, 49, depth=1.0), task(2048, 48, 20), task(4096, 20, 0)]
    found = tasks_verdict(rows)
    assert found["departs_at"] == 2048 and found["compared"] == 2 and found["dense_below"] == 1
    assert found["holds_up_to"] == 1024  # not 2048, the longest that was compared
    assert found["departs_in"] == [{"task": "needle", "length": 2048}]
    words = verdict({"tasks": rows[:2]}, 0.01)["words"]
    assert "no departure in 1 cells" in words and "at worst -0." in words
    assert "tell nothing" in verdict({"tasks": rows[3:]}, 0.01)["words"]


def test_the_smallest_k_that_would_do() -> None:
    def of(k: int, high: float, worst: float) -> list[dict]:
        total = {"k": k, "all": 1, "high": high, "low_all": 0.0}
        return [total, {"k": k, "all": 0, "high": high, "low_all": worst}]

    rows = [*of(16, 0.3, 0.2), *of(32, 0.005, 0.02), *of(64, 0.005, 0.001), *of(128, 0.0, 0.0)]
    assert enough_topk(rows, 0.01) == 64  # 32 is within the margin on the whole, but departs in a bucket
    assert enough_topk(rows[:2], 0.01) is None
    one = [row | {"high": None, "low_all": None} for row in rows]  # of one sequence: nothing is known
    assert "certain" in verdict({"loss_by_topk": one}, 0.01)["words"]
    words = verdict({"loss_by_topk": rows}, 0.01)["words"]
    assert words == "Of the k tried, 64 would have been enough."


@pytest.mark.parametrize(
    ("low", "high", "holds", "said"),
    [(-0.001, 0.002, True, ": the same"), (0.02, 0.03, False, ": not the same"), (-0.4, 0.5, None, ": undecided")]
    + [(0.005, 0.02, None, ": undecided"), (None, None, None, ": undecided")],
)
def test_parity_of_short_context(low: float | None, high: float | None, holds: bool | None, said: str) -> None:
    found = verdict({"short_context": {"up_to": 512, "difference": 0.0, "low": low, "high": high}}, 0.01)
    assert found["short_context_holds"] is holds and said in found["words"]
