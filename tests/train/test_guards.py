"""The loss guards."""

from __future__ import annotations

import pytest

from train.guards import FEWEST, WINDOW, Guard, TooManySkips


def filled(count: int = FEWEST, loss: float = 2.0) -> Guard:
    guard = Guard(spike_factor=3.0, max_skipped=2)
    for _ in range(count):
        assert guard.judge(loss, 1.0) is None
    return guard


NOT_FINITE = [(float("nan"), 1.0, "loss nan"), (1.0, float("inf"), "gradient norm inf")]


@pytest.mark.parametrize(("loss", "norm", "reason"), NOT_FINITE)
def test_what_is_not_finite_is_left_out_from_the_first_step(loss: float, norm: float, reason: str) -> None:
    assert (Guard(3.0, 2).judge(loss, norm) or "").startswith(reason)


def test_a_spike_needs_a_history_and_a_factor() -> None:
    assert filled(FEWEST - 1).judge(100.0, 1.0) is None
    assert filled().judge(5.9, 1.0) is None
    assert "loss 6.1 above 3 x 2," in (filled().judge(6.1, 1.0) or "")


def test_the_window_runs() -> None:
    guard = filled(WINDOW, 10.0)
    for _ in range(WINDOW - 6):
        guard.judge(2.0, 1.0)
    assert len(guard.window) == WINDOW
    assert guard.judge(6.1, 1.0) is not None  # six high ones are too few


def test_two_kinds_of_data_are_no_spikes_whichever_is_more_frequent() -> None:
    """Steps of sums at 0.3 and of text at 3.5, and a stretch of text that is easy; a true spike is one at all times."""
    guard = filled(FEWEST, 6.0)
    for text, share in ((3.5, 3), (1.2, 3), (3.5, 2), (3.7, 1)):
        for step in range(WINDOW + 20):
            assert guard.judge(text if step % 5 < share else 0.3, 1.0) is None
        assert guard.judge(12.0, 1.0) is not None


def test_data_that_became_harder_are_let_in() -> None:
    guard = filled(WINDOW, 1.0)
    verdicts = [guard.judge(4.0, 1.0) is None for _ in range(20)]
    assert verdicts == [False] * 7 + [True] * 13


def test_where_nearly_nothing_is_left_to_learn_a_miss_is_no_spike() -> None:
    guard = filled(FEWEST, 5.0)
    for _ in range(WINDOW):
        guard.judge(0.0004, 1.0)
    assert guard.judge(0.5, 1.0) is None
    assert guard.judge(1.6, 1.0) is not None


def test_too_many_skips_name_step_and_values() -> None:
    guard = filled()
    guard.count_skip(7, "loss nan")
    guard.count_skip(8, "loss nan")
    with pytest.raises(TooManySkips, match="step 9: loss nan; 3 steps were left out, more than .*max_skipped_steps=2"):
        guard.count_skip(9, "loss nan")


def test_state_goes_round() -> None:
    guard = filled()
    guard.count_skip(3, "loss nan")
    other = Guard(3.0, 2)
    other.load_state(guard.state())
    assert (other.window, other.first, other.skipped) == (guard.window, 2.0, 1)
    assert other.judge(6.1, 1.0) == guard.judge(6.1, 1.0)


def test_a_state_without_the_first_losses_is_read() -> None:
    guard = Guard(3.0, 2)
    guard.load_state({"window": [2.0] * WINDOW, "skipped": 1})
    assert guard.judge(2.0, 1.0) is None and guard.judge(6.1, 1.0) is not None
