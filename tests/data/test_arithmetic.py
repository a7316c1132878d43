"""Worked addition: right sums and columns, and a held-out pair that no training path shows in either order."""

from __future__ import annotations

import re
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import UserError
from conf.schema import DataConfig
from data.sources import documents
from data.split import is_heldout
from data.tasks import arithmetic
from data.tasks.arithmetic import column_steps, grade, heldout_pairs, make_problem, problem_at, problems, prompt_key

OPERAND = st.integers(0, 10**18 - 1)


def test_the_form_of_a_problem() -> None:
    problem = make_problem(47, 38)
    assert (problem.key, problem.prompt, problem.answer) == ("38+47", "47+38=?", "85")
    assert problem.working == "7+8=15,4+3+1=8"
    assert make_problem(97, 5).working == "7+5=12,9+0+1=10" and make_problem(0, 0).working == "0+0=0"


@given(a=OPERAND, b=OPERAND)
def test_columns_are_true_sums_whose_last_digits_make_the_answer(a: int, b: int) -> None:
    steps = [re.fullmatch(r"(\d)\+(\d)(\+1)?=(\d+)", step) for step in column_steps(a, b).split(",")]
    totals = []
    for step in steps:
        assert step is not None and int(step[1]) + int(step[2]) + bool(step[3]) == int(step[4])
        totals.append(step[4])
    carries = [len(total) == 2 for total in totals]
    assert [bool(step[3]) for step in steps] == [False, *carries[:-1]]
    assert totals[-1] + "".join(total[-1] for total in totals[-2::-1]) == str(a + b)


def test_at_least_256_pairs_of_two_digits_are_held_out_at_the_default_share() -> None:
    pairs = heldout_pairs(2, DataConfig().heldout)
    assert len(set(pairs)) == len(pairs) >= 256
    assert all(10 <= a <= b < 100 for a, b in pairs)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), digits=st.integers(1, 3), share=st.sampled_from([0.01, 0.05, 0.3]))
def test_training_never_shows_a_held_out_pair_in_either_order(seed: int, digits: int, share: float) -> None:
    held = {frozenset(pair) for pair in heldout_pairs(digits, share, limit=300)}
    for problem in islice(problems("train", seed, digits, share), 300):
        a, b = map(int, problem.prompt.removesuffix("=?").split("+"))
        assert frozenset((a, b)) not in held and not is_heldout(problem.key, share)
    for problem in islice(problems("heldout", seed, digits, share), 20):
        assert is_heldout(problem.key, share)


def test_what_is_held_out_stays_so_at_a_larger_share() -> None:
    assert set(heldout_pairs(2, 0.1)) < set(heldout_pairs(2, 0.2))
    assert heldout_pairs(2, 0.001) == heldout_pairs(2, 0.1), "of small additions a tenth is held out at any share"
    rare, often = (set(heldout_pairs(3, share, limit=50)) for share in (0.01, 0.2))
    assert all(is_heldout(f"{a}+{b}", 0.2) for a, b in rare) and rare != often


def test_both_orders_occur_and_operands_fill_the_range() -> None:
    found = list(islice(problems("train", 0, 2), 5000))
    operands = [tuple(map(int, problem.prompt[:-2].split("+"))) for problem in found]
    assert any(a > b for a, b in operands) and any(a < b for a, b in operands)
    assert {a for a, _ in operands} == set(range(10, 100)) == {b for _, b in operands}
    single = {problem.prompt for problem in islice(problems("train", 0, 1), 2000)}
    assert {"0+0=?", "9+9=?"} & single and all(len(prompt) == 5 for prompt in single)
    share_of_carries = sum(bool(re.search(r"\+\d\+1=", problem.working)) for problem in found) / 5000
    assert 0.42 < share_of_carries < 0.48  # the units carry in 45 of 100 cases, and the tens show it


def test_problems_depend_on_seed_and_split_and_can_be_reached_at_once() -> None:
    first = list(islice(problems("train", 3, 2), 50))
    assert first[20:] == list(islice(problems("train", 3, 2, start=20), 30))
    assert first[7] == problem_at(7, "train", 3, 2, 0.05)
    assert first != list(islice(problems("train", 4, 2), 50))
    assert not {p.key for p in first} & {p.key for p in islice(problems("heldout", 3, 2), 50)}


def test_keys_of_prompts_that_others_wrote() -> None:
    assert prompt_key("47+38=?") == prompt_key(" 38 + 47 = ") == "38+47" == prompt_key("038+47=")
    assert prompt_key("What is 47+38?") is None and prompt_key("4" * 5000 + "+1=") is None


def test_grade_is_exact() -> None:
    assert grade("85", "85") == grade(" 85\n", "85") == 1.0
    assert [grade(text, "85") for text in ("", "8", "085", "85.", "185", "85 85")] == [0.0] * 6


def test_synthetic_documents_are_conversations_with_the_working_as_reasoning() -> None:
    document = next(documents(DataConfig(source="synthetic"), "train", seed=5))
    problem = problem_at(0, "train", 5, 2, 0.05)
    assert document.key == problem.key and document.messages == problem.messages()
    assert document.messages[1]["reasoning_content"] == problem.working


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_problems_shows_its_working(share: float) -> None:
    found = list(islice(documents(DataConfig(source="synthetic", worked_share=share), "train", seed=1), 800))
    worked = [bool(document.messages and document.messages[1]["reasoning_content"]) for document in found]
    assert sum(worked) / 800 == pytest.approx(share, abs=0.06)
    later = islice(documents(DataConfig(source="synthetic", worked_share=share), "train", seed=1, start=300), 100)
    assert [document.messages for document in later] == [document.messages for document in found[300:400]]


def test_mistakes_end_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="data.operand_digits=19 is out of range: give 1 to 18"):
        problem_at(0, "train", 0, 19, 0.05)
    monkeypatch.setattr(arithmetic, "MAX_DRAWS", 100)
    with pytest.raises(UserError, match="leaves no addition in the heldout split"):
        problem_at(0, "heldout", 0, 12, 1e-15)
