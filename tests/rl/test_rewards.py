"""Reward parts by value, and the pool under graders that sleep, raise, die and lie."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from conf.schema import RLConfig
from rl.rewards import Attempt, extract_answer, part_names, total_reward
from rl.rewards.pool import RewardPool
from rl.rewards.rules import REWARDS

GRADERS = "tests.rl.graders:REWARDS"


def attempt(text: str, answer: str = "85", finished: bool = True, prompt: str = "47+38=?") -> Attempt:
    return Attempt(prompt, answer, text, num_tokens=16, max_tokens=64, finished=finished)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7+8=15</think>85", "85"),
        ("</think> 85 \n", "85"),
        ("x</think>85<｜end▁of▁sentence｜>86", "85"),
        ("85", None),
        ("</think>", ""),
        ("</think>1</think>85", "1</think>85"),
    ],
)
def test_extract_answer(text: str, answer: str | None):
    assert extract_answer(text) == answer


def test_parts_by_value():
    right = attempt("7+8=15</think>85")
    assert REWARDS["exact_match"](right) == 1.0
    assert REWARDS["exact_match"](attempt("</think>85.0")) == 0.0
    assert REWARDS["exact_match"](attempt("</think>85", finished=False)) == 0.0
    assert REWARDS["exact_match"](attempt("85")) == 0.0
    assert REWARDS["math_verify"](attempt("</think>85.0")) == 1.0
    assert REWARDS["math_verify"](attempt("</think>\\frac{1}{2}", answer="0.5")) == 1.0
    assert REWARDS["math_verify"](attempt("</think>86")) == 0.0
    assert REWARDS["math_verify"](attempt("</think>((((")) == 0.0
    assert REWARDS["format"](right) == 1.0
    assert REWARDS["format"](attempt("</think>1</think>85")) == 0.0
    assert REWARDS["format"](attempt("</think>")) == 0.0
    assert REWARDS["length"](right) == 0.25


def test_a_task_grades_its_own():
    def by_task(task: str, prompt: str, answer: str, text: str) -> float:
        return REWARDS["task"](replace(attempt(f"so</think>{text}", answer, prompt=prompt), task=task))

    assert by_task("countdown", "make 24 from 8,3", "8*3", " 3*8 ") == 1.0
    assert by_task("countdown", "make 24 from 8,3", "8*3", "8*3*1") == 0.0
    assert by_task("sorting", "sort 2,1", "1,2", "1, 2") == 1.0
    assert by_task("words", "whoever asks", "26", "26") == by_task("", "what?", "Bern", "Bern") == 1.0
    assert by_task("", "make 24 from 8,3", "8*3", "3*8") == 0.0  # no task: letter by letter
    cut = replace(attempt("so</think>8*3", "8*3", finished=False, prompt="make 24 from 8,3"), task="countdown")
    assert REWARDS["task"](cut) == REWARDS["task"](replace(cut, finished=True, text="8*3")) == 0.0
    with pytest.raises(ValueError, match="'hm' is no countdown problem"):
        by_task("countdown", "hm", "8*3", "8*3")


def test_an_unreadable_reference_is_no_reward_zero():
    with pytest.raises(ValueError, match="'no number' is not readable"):
        REWARDS["math_verify"](attempt("</think>85", answer="no number"))


def test_the_reward_of_parts():
    rl = RLConfig(length_penalty=0.2, format_weight=0.5, outcome="math_verify")
    assert total_reward({"math_verify": 1.0, "format": 1.0, "length": 0.25}, rl) == pytest.approx(0.95 + 0.5)
    for length in (0.1, 1.0):  # a wrong answer gains nothing by being short
        assert total_reward({"math_verify": 0.0, "format": 1.0, "length": length}, rl) == 0.5
    assert part_names(rl) == ("math_verify", "format", "length")


def test_grades_come_back_in_order():
    with RewardPool(2, 30.0) as pool:
        texts = [f"</think>{n}" for n in range(80, 90)]
        grades = pool.grade([attempt(text) for text in texts], [["exact_match", "math_verify"]] * len(texts))
        assert [g.parts for g in grades] == [
            {"exact_match": float(n == 85), "math_verify": float(n == 85)} for n in range(80, 90)
        ]
        assert pool.grade([], []) == []


def test_a_sleeping_a_raising_and_a_dying_grader_are_failures_and_the_rest_goes_on():
    with RewardPool(1, 1.0, GRADERS) as pool:
        texts = ["ab", "sleep", "abc", "raise", "abcd", "exit", "abcde", "nan", "print"]
        start = time.monotonic()
        grades = pool.grade([attempt(text) for text in texts], [["by_text"]] * len(texts))
        assert time.monotonic() - start < 60
    assert [g.parts and g.parts["by_text"] for g in grades] == [2.0, None, 3.0, None, 4.0, None, 5.0, None, 5.0]
    errors = [g.error for g in grades if g.parts is None]
    assert errors[0] == "no grade within 1.0 s"
    assert errors[1] is not None and errors[1].startswith("KeyError")
    assert errors[2] == "the grader's process died"
    assert errors[3] is not None and "not a finite number" in errors[3]


def alive(pid: int) -> bool:
    """A zombie whose parent has yet to reap it is not alive."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc to look for processes")
def test_a_kill_takes_the_graders_children_too(tmp_path: Path):
    note = tmp_path / "pids"
    with RewardPool(1, 2.0, GRADERS) as pool:
        (grade,) = pool.grade([attempt("child", prompt=str(note))], [["by_text"]])
        assert grade.error == "no grade within 2.0 s"
        pids = [int(pid) for pid in note.read_text().split()]
        deadline = time.monotonic() + 10
        while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [alive(pid) for pid in pids] == [False, False]


def test_sigterm_to_the_whole_job_loses_no_grade():
    with RewardPool(1, 30.0, GRADERS) as pool:
        assert pool.grade([attempt("ab")], [["by_text"]])[0].parts == {"by_text": 2.0}
        os.kill(pool.workers[0].process.pid, signal.SIGTERM)
        assert pool.grade([attempt("abc")], [["by_text"]])[0].parts == {"by_text": 3.0}


def test_a_worker_that_cannot_start_is_an_error():
    with (
        RewardPool(1, 1.0, "tests.rl.no_such_module:REWARDS") as pool,
        pytest.raises(RuntimeError, match="did not start"),
    ):
        pool.grade([attempt("x")], [["by_text"]])
