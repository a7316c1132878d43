"""The proof reward of DeepSeekMath-V2 (arXiv 2511.22570, sec. 2.2): the policy writes a proof Y and its own analysis Z
of it, with a score s'; a verifier scores Y with s, a meta-verifier scores Z as an analysis.

    R = R_format(Y, Z) (0.76 R_Y + 0.24 R_Z),   R_Y = s,   R_Z = R_score(s', s) R_meta(Z),   R_score = 1 - |s' - s|

All scores are 0, 0.5 or 1. The headings and phrases of the formats are the paper's (appendix A); the prompts around
them are ours, and verifier and meta-verifier are the run's judge. The two questions do not depend on each other, so
they are asked at once. A proof without the format gets its 0 without a question; a verifier or meta-verifier whose
reply lacks its own format is a failed grade.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rl.rewards.attempt import Attempt, extract_answer
from rl.rewards.client import Question
from rl.rewards.judge import INSTRUCTIONS, quoted

ALPHA, BETA = 0.76, 0.24
SOLUTION, SELF_EVALUATION = "## Solution", "## Self Evaluation"
EVALUATION = "Here is my evaluation of the solution:"
FINAL_SCORE = "Based on my evaluation, the final overall score should be:"
ANALYSIS = 'Here is my analysis of the "solution evaluation":'
RATING = 'Based on my analysis, I will rate the "solution evaluation" as:'
BOXED = re.compile(r"(?:\$\$?|\\\[)?\s*\\boxed\{\s*(0|0\.5|1)\s*\}\s*(?:\$\$?|\\\])?\.?")
LONGEST_BOXED = 40  # characters: hostile text is not given to a pattern at length

CRITERIA = """\
- 1: the solution is completely correct, every step is carried out properly and shown clearly;
- 0.5: it is right on the whole, with details left out or minor errors;
- 0: it does not solve the problem, holds a fatal error, or leaves out what matters.
A result that is cited from elsewhere must be proved as well; a solution that leans on one without a proof is no 1."""
REPLY_FORM = """\
End your reply in exactly this form, SCORE being 0, 0.5 or 1:

{opening}
(your analysis)

{closing}
\\boxed{{SCORE}}"""


@dataclass(frozen=True)
class Proof:
    """An answer in the format: Y, Z and s'."""

    solution: str
    analysis: str  # from "Here is my evaluation" to its score
    own_score: float


def r_score(predicted: float, actual: float) -> float:
    """R_score(s', s)."""
    return 1.0 - abs(predicted - actual)


def r_analysis(own_score: float, verified: float, meta: float) -> float:
    """R_Z."""
    return r_score(own_score, verified) * meta


def proof_reward(own_score: float, verified: float, meta: float) -> float:
    """R of an answer that has the format."""
    return ALPHA * verified + BETA * r_analysis(own_score, verified, meta)


def score_after(text: str, opening: str, closing: str) -> float | None:
    """The score of an analysis: `opening` once, then `closing` once, then a boxed score and nothing else; or None."""
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    end = text.partition(opening)[2].partition(closing)[2].strip()
    found = BOXED.fullmatch(end) if len(end) <= LONGEST_BOXED else None
    return None if found is None else float(found[1])


def read_proof(answer: str) -> Proof | None:
    """R_format: None where the answer is not `## Solution`, Y, `## Self Evaluation`, Z with its score."""
    if not answer.startswith(SOLUTION) or answer.count(SELF_EVALUATION) != 1:
        return None
    solution, _, analysis = answer.removeprefix(SOLUTION).partition(SELF_EVALUATION)
    solution, analysis = solution.strip(), analysis.strip()
    own_score = score_after(analysis, EVALUATION, FINAL_SCORE)
    if not solution or own_score is None or not analysis.startswith(EVALUATION):
        return None
    return Proof(solution, analysis, own_score)


def proof_of(attempt: Attempt) -> Proof | None:
    """The proof of an answer that has the format and was not cut off."""
    answer = extract_answer(attempt.text)
    return read_proof(answer) if answer and attempt.finished else None


def generator_prompt(problem: str) -> str:
    """What the policy is asked: the problem, and the format of its answer."""
    return f"""\
Solve the problem below with a complete and rigorous proof; where it asks for an answer, prove that it is right. Then
evaluate your own solution honestly, by these criteria:
{CRITERIA}
A flaw that you could not mend and that you name costs you less than one that you deny.

Answer in exactly this form, SCORE being 0, 0.5 or 1:

{SOLUTION}
(your solution)

{SELF_EVALUATION}
{EVALUATION}
(your evaluation, step by step)

{FINAL_SCORE}
\\boxed{{SCORE}}

Problem:
{problem}"""


def verifier_question(attempt: Attempt, proof: Proof) -> Question:
    """Asks for s, the score of Y. The verifier does not see Z."""
    task = f"The answer is a solution to the problem; the rubric is:\n{CRITERIA}\nGo through its steps one by one."
    form = REPLY_FORM.format(opening=EVALUATION, closing=FINAL_SCORE)
    pieces = [quoted("PROBLEM", attempt.prompt), quoted("SOLUTION", proof.solution)]
    prompt = "\n\n".join([INSTRUCTIONS, task, *pieces, form])
    return Question(prompt, lambda reply: _verdict(reply, EVALUATION, FINAL_SCORE))


def meta_question(attempt: Attempt, proof: Proof) -> Question:
    """Asks for R_meta, the score of Z."""
    task = f"""\
The answer is an evaluation of a solution to a problem, made by these criteria:
{CRITERIA}
Judge the evaluation, not the solution: does the solution do what the evaluation says of it, are the defects that it
names real and explained rightly, and does its score follow from them? What it calls correct is not yours to check.
The rubric is:
- 1: every defect that it names is real, or it names none; what it says is accurate and its score follows;
- 0.5: some of the defects that it names are not real, or it is inaccurate, or its score does not follow;
- 0: none of the defects that it names is real."""
    form = REPLY_FORM.format(opening=ANALYSIS, closing=RATING)
    pieces = [quoted("PROBLEM", attempt.prompt), quoted("SOLUTION", proof.solution)]
    pieces.append(quoted("SOLUTION EVALUATION", proof.analysis))
    prompt = "\n\n".join([INSTRUCTIONS, task, *pieces, form])
    return Question(prompt, lambda reply: _verdict(reply, ANALYSIS, RATING))


def _verdict(reply: str, opening: str, closing: str) -> float:
    """The score of a verifier's reply, which may think aloud before its final form. Raises ValueError where it has
    none."""
    start = reply.rfind(opening)
    found = score_after(reply[start:], opening, closing) if start >= 0 else None
    if found is None:
        raise ValueError("the verifier's reply lacks its phrases or its score of 0, 0.5 or 1")
    return found
