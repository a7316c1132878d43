"""The proof reward by hand-worked numbers, its formats letter by letter, and its two questions over real HTTP."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from conf.schema import RLConfig
from rl.rewards import Attempt, part_names, total_reward
from rl.rewards.client import JudgeClient
from rl.rewards.judged import judge_grades
from rl.rewards.pool import Grade
from rl.rewards.proof import (
    Proof,
    generator_prompt,
    meta_question,
    proof_of,
    proof_reward,
    r_analysis,
    r_score,
    read_proof,
    verifier_question,
)
from tests.rl.judge_server import Reply, serve

ANSWER = """\
## Solution
2 + 2 = 4 since 1 + 1 = 2.

## Self Evaluation
Here is my evaluation of the solution:
Each step holds.

Based on my evaluation, the final overall score should be:
\\boxed{0.5}"""
VERIFIED = """\
Let me think. Here is my evaluation of the solution: is how I must begin.

Here is my evaluation of the solution:
A step is missing.

Based on my evaluation, the final overall score should be:
\\boxed{1}"""
RATED = """\
Here is my analysis of the "solution evaluation":
It names no defect.

Based on my analysis, I will rate the "solution evaluation" as:
\\boxed{0.5}"""


def attempt(answer: str = ANSWER, finished: bool = True) -> Attempt:
    return Attempt("Prove it.", "", f"thinking</think>{answer}", 8, 16, finished)


def test_the_formulas_by_hand():
    """s' own score, s the verifier's, ms the meta-verifier's: 0.76 s + 0.24 (1 - |s' - s|) ms."""
    assert [r_score(0.5, 1.0), r_score(0.0, 1.0), r_score(1.0, 1.0)] == [0.5, 0.0, 1.0]
    assert r_analysis(own_score=0.5, verified=1.0, meta=0.5) == 0.25
    by_hand = {
        (1.0, 1.0, 1.0): 1.0,  # a right proof, called right
        (0.5, 1.0, 1.0): 0.88,  # 0.76 + 0.24 x 0.5
        (0.5, 1.0, 0.5): 0.82,  # 0.76 + 0.24 x 0.5 x 0.5
        (1.0, 0.0, 1.0): 0.0,  # a wrong proof, called right
        (0.0, 0.0, 1.0): 0.24,  # a wrong proof, owned up to
        (0.5, 0.5, 0.0): 0.38,  # half right, and the analysis worth nothing
        (0.0, 1.0, 1.0): 0.76,
    }
    assert {case: proof_reward(*case) for case in by_hand} == pytest.approx(by_hand)


def test_the_format_that_passes():
    assert read_proof(ANSWER) == Proof(
        "2 + 2 = 4 since 1 + 1 = 2.", ANSWER.partition("## Self Evaluation\n")[2], own_score=0.5
    )
    for score, value in (("0", 0.0), ("1", 1.0), (" 0.5 ", 0.5)):
        found = read_proof(ANSWER.replace("{0.5}", f"{{{score}}}"))
        assert found is not None and found.own_score == value
    assert read_proof(ANSWER.replace("\\boxed{0.5}", "$\\boxed{0.5}$.")) is not None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("## Solution", "# Solution"),
        ("## Solution", "Well.\n## Solution"),
        ("2 + 2 = 4 since 1 + 1 = 2.", ""),
        ("## Self Evaluation", "## Evaluation"),
        ("Each step holds.", "## Self Evaluation"),
        ("Here is my evaluation of the solution:", "Here is my evaluation:"),
        ("Here is my evaluation of the solution:", "here is my evaluation of the solution:"),
        ("Each step holds.", "Here is my evaluation of the solution:"),
        ("Here is my evaluation of the solution:", "First: Here is my evaluation of the solution:"),
        ("Based on my evaluation, the final overall score should be:", "Score:"),
        ("Each step holds.", "Based on my evaluation, the final overall score should be:"),
        ("\\boxed{0.5}", "0.5"),
        ("\\boxed{0.5}", "\\boxed{0.75}"),
        ("\\boxed{0.5}", "\\boxed{0.50}"),
        ("\\boxed{0.5}", "\\boxed{2}"),
        ("\\boxed{0.5}", "\\boxed{}"),
        ("\\boxed{0.5}", "\\boxed{0.5} or \\boxed{1}"),
        ("\\boxed{0.5}", "\\boxed{0.5}\nThank you."),
        ("\\boxed{0.5}", ""),
    ],
)
def test_formats_that_do_not(old: str, new: str):
    assert old in ANSWER and read_proof(ANSWER.replace(old, new)) is None


def test_a_long_hostile_end_is_read_at_once():
    start = time.monotonic()
    assert read_proof(ANSWER.replace("\\boxed{0.5}", " " * 300_000 + "x" + "$" * 300_000)) is None
    assert time.monotonic() - start < 1


def test_a_proof_that_was_cut_off_has_no_format():
    assert proof_of(attempt()) is not None and proof_of(attempt(finished=False)) is None
    assert proof_of(Attempt("Prove it.", "", ANSWER, 8, 16, True)) is None  # inside the thought


def test_what_each_of_the_two_is_shown():
    proof = read_proof(ANSWER)
    assert proof is not None
    verifier, meta = (ask(attempt(), proof).prompt for ask in (verifier_question, meta_question))
    assert "2 + 2 = 4" in verifier and "Prove it." in verifier and "Each step holds." not in verifier
    assert "2 + 2 = 4" in meta and "Each step holds." in meta
    assert 'I will rate the "solution evaluation" as:' in meta and "final overall score should be:" in verifier


def test_their_replies_by_their_own_formats():
    proof = read_proof(ANSWER)
    assert proof is not None
    verifier, meta = verifier_question(attempt(), proof), meta_question(attempt(), proof)
    assert (verifier.score(VERIFIED), meta.score(RATED)) == (1.0, 0.5)
    for question, reply in ((verifier, RATED), (meta, VERIFIED), (verifier, "\\boxed{1}"), (meta, RATED + " maybe")):
        with pytest.raises(ValueError, match="lacks its phrases"):
            question.score(reply)


def test_the_policy_is_told_the_format_that_is_checked():
    told = generator_prompt("Prove it.")
    for phrase in ("## Solution\n", "## Self Evaluation\n", "Here is my evaluation of the solution:\n"):
        assert phrase in told
    assert "Based on my evaluation, the final overall score should be:\n\\boxed{SCORE}" in told
    assert told.endswith("Prove it.")


def test_grades_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """s' = 0.5, s = 1, ms = 0.5 -> 0.82; no format is 0 and no request; a meta-verifier that talks nonsense, or a
    verifier that does, is a failure."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def behave(prompt: str, n: int) -> Reply:
        meta = "rate the" in prompt
        if ("bad meta" in prompt and meta) or ("bad verifier" in prompt and not meta):
            return Reply("It is fine. \\boxed{1}")
        return Reply(RATED if meta else VERIFIED)

    with serve(behave) as server:
        rl = RLConfig(outcome="proof", judge_url=server.url, judge_model="m", judge_key_env=None, judge_workers=2)
        answers = [ANSWER, "4", *(ANSWER.replace("since", bad) for bad in ("bad meta", "bad verifier"))]
        with JudgeClient(rl, tmp_path, 0, 1) as client:
            grades = judge_grades([attempt(answer) for answer in answers], client, rl)
    parts = {"proof": pytest.approx(0.82), "proof_verified": 1.0, "proof_analysis": 0.25}
    failed = Grade(None, "judge: the verifier's reply lacks its phrases or its score of 0, 0.5 or 1")
    assert grades == [Grade(parts), Grade(dict.fromkeys(parts, 0.0)), failed, failed]
    assert len(server.asked) == 6
    assert part_names(rl)[:3] == tuple(parts)
    assert total_reward({"proof": 0.5, "format": 0.0, "length": 1.0}, rl) == 0.5
