"""Packing against its contract: every token of an epoch once, whole documents where they fit, little padding."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.best_fit import MAX_PADDING, make_plan
from data.layout import BestFit, Concat

LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=60)


def best_fit(lengths: list[int] | np.ndarray, seq_len: int, seed: int = 0, max_cut: float = 0.0) -> BestFit:
    return BestFit(np.array(lengths), np.arange(len(lengths)), seq_len, seed, max_cut)


@settings(max_examples=300, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 40), max_cut=st.sampled_from([0.0, 0.1, 1.0]), epoch=st.integers(0, 2))
def test_an_epoch_holds_every_token_once_and_cuts_no_more_than_it_may(lengths, seq_len, max_cut, epoch) -> None:
    layout = best_fit(lengths, seq_len, max_cut=max_cut)
    count = layout.plan.num_sequences
    spans = [list(layout.spans(number)) for number in range(epoch * count, (epoch + 1) * count)]
    assert all(0 < sum(end - start for _, start, end in row) <= seq_len for row in spans)
    tokens = Counter((one, at) for row in spans for one, start, end in row for at in range(start, end))
    assert tokens == Counter((one, at) for one, length in enumerate(lengths) for at in range(length))
    pieces = Counter(one for row in spans for one, _, _ in row)
    fits = [one for one, length in enumerate(lengths) if length <= seq_len]
    cut = sum(pieces[one] > 1 for one in fits)
    assert cut <= max_cut * len(fits)
    if max_cut == 0:
        assert all(pieces[one] == -(-length // seq_len) for one, length in enumerate(lengths)), "cut every seq_len"


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_the_plan_is_that_of_best_fit_decreasing(lengths: list[int]) -> None:
    seq_len, rooms = 20, []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(seq_len - length)
    plan = make_plan(np.array(sorted(lengths, reverse=True)), seq_len)
    used = np.add.reduceat(plan.length, plan.first[:-1])
    assert sorted(seq_len - used) == sorted(rooms)


def test_documents_of_natural_lengths_leave_almost_no_padding_and_none_is_cut() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1.5, 20_000), 1, 200_000).astype(np.int64)
    found, concat = best_fit(lengths, 4096).figures(), Concat(lengths, np.arange(20_000), 4096, 0).figures()
    assert found.padding < 0.002 and found.cut == 0 and concat.padding == 0 and concat.cut > 0.1


def test_where_lengths_are_awkward_documents_are_cut_up_to_the_share_given() -> None:
    lengths = np.random.default_rng(0).integers(520, 980, 5000)
    never, few, all_of_them = (best_fit(lengths, 1000, max_cut=share).figures() for share in (0.0, 0.05, 1.0))
    assert never.padding > 0.2 and never.cut == 0
    assert never.padding - 0.02 > few.padding and 0.04 < few.cut <= 0.05
    assert all_of_them.padding <= MAX_PADDING and all_of_them.cut < 0.5


def test_lengths_that_no_packing_serves_come_to_what_the_docs_say() -> None:
    lengths = np.random.default_rng(7).integers(2100, 4001, 20_000)
    few, many = (best_fit(lengths, 4096, max_cut=share).figures() for share in (0.02, 1.0))
    assert (few.padding, few.cut) == (pytest.approx(0.24, abs=0.005), pytest.approx(0.02, abs=0.001))
    assert (many.padding, many.cut) == (pytest.approx(0.02, abs=0.0005), pytest.approx(0.24, abs=0.005))


def test_epochs_differ_and_any_sequence_is_reached_at_once() -> None:
    lengths = np.random.default_rng(1).integers(1, 300, 500)
    one, two = best_fit(lengths, 256, seed=3), best_fit(lengths, 256, seed=3)
    count = one.plan.num_sequences
    rows = [list(one.spans(number)) for number in range(2 * count)]
    assert list(two.spans(count + 7)) == rows[count + 7] and list(two.spans(0)) == rows[0]
    assert rows[:count] != rows[count:] and list(best_fit(lengths, 256, seed=4).spans(0)) != rows[0]
    assert {frozenset(row) for row in rows[:count]} != {frozenset(row) for row in rows[count:]}, "other neighbours"


def test_a_document_that_occurs_three_times_does_so_in_both_layouts() -> None:
    lengths, chosen = np.array([5, 50, 7]), np.array([0, 1, 1, 1, 2])
    layout = BestFit(lengths, chosen, 16, 0, 0.0)
    tokens: Counter[int] = Counter()
    for number in range(layout.plan.num_sequences):
        tokens.update({one: end - start for one, start, end in layout.spans(number)} or {})
    spans = [span for number in range(layout.plan.num_sequences) for span in layout.spans(number)]
    assert Counter(one for one, start, _ in spans if start == 0) == {0: 1, 1: 3, 2: 1}
    concat = Concat(lengths, chosen, 16, 0)
    assert concat.total == 162
    starts = [span.document for number in range(-(-162 // 16)) for span in concat.spans(number) if span.start == 0]
    assert Counter(starts[:5]) == {0: 1, 1: 3, 2: 1}


def test_a_hundred_thousand_documents_of_all_lengths_are_planned_fast() -> None:
    import time

    lengths = np.sort(np.random.default_rng(0).integers(1, 131_073, 100_000))[::-1].copy()
    start = time.process_time()
    plan = make_plan(lengths, 131_072)
    assert time.process_time() - start < 20, "quadratic would be minutes"
    assert 1 - lengths.sum() / (plan.num_sequences * 131_072) < MAX_PADDING


@pytest.mark.parametrize("lengths", [[], [3, 4], [5, 0], [17]])
def test_a_plan_needs_falling_lengths_that_fit(lengths: list[int]) -> None:
    with pytest.raises(AssertionError):
        make_plan(np.array(lengths, np.int64), 16)
