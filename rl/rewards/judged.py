"""The parts that another model gives: which questions an attempt raises, and what their scores make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from conf.schema import RLConfig
from rl.rewards.attempt import Attempt
from rl.rewards.client import JudgeClient, Question, Verdict
from rl.rewards.judge import rubric_question
from rl.rewards.pool import Grade
from rl.rewards.proof import meta_question, proof_of, proof_reward, r_analysis, verifier_question


@dataclass(frozen=True)
class Plan:
    """What to ask for an attempt, and the parts that the scores, in this order, come to."""

    questions: tuple[Question, ...]
    parts: Callable[[Sequence[float]], dict[str, float]]


def rubric_plan(attempt: Attempt) -> Plan:
    """`judge`: no answer is a 0 that needs no judge."""
    question = rubric_question(attempt)
    if question is None:
        return Plan((), lambda scores: {"judge": 0.0})
    return Plan((question,), lambda scores: {"judge": scores[0]})


def proof_plan(attempt: Attempt) -> Plan:
    """`proof`, and what it is made of: `proof_verified` (R_Y) and `proof_analysis` (R_Z)."""
    proof = proof_of(attempt)
    if proof is None:
        return Plan((), lambda scores: dict.fromkeys(("proof", "proof_verified", "proof_analysis"), 0.0))

    def parts(scores: Sequence[float]) -> dict[str, float]:
        verified, meta = scores
        analysis = r_analysis(proof.own_score, verified, meta)
        reward = proof_reward(proof.own_score, verified, meta)
        return {"proof": reward, "proof_verified": verified, "proof_analysis": analysis}

    return Plan((verifier_question(attempt, proof), meta_question(attempt, proof)), parts)


def plans_of(attempt: Attempt, rl: RLConfig) -> list[Plan]:
    """An attempt whose row has no rubric raises no question of one."""
    plans = [proof_plan(attempt)] if rl.outcome == "proof" else []
    return plans + ([rubric_plan(attempt)] if attempt.rubric and (rl.outcome == "judge" or rl.judge_weight > 0) else [])


def judge_grades(attempts: Sequence[Attempt], client: JudgeClient, rl: RLConfig) -> list[Grade]:
    """One grade an attempt, in their order; a question without a score fails the whole grade."""
    plans = [plans_of(attempt, rl.of(attempt.domain)) for attempt in attempts]
    verdicts = iter(client.ask([question for some in plans for plan in some for question in plan.questions]))
    return [_grade(some, verdicts) for some in plans]


def _grade(plans: Sequence[Plan], verdicts: Iterator[Verdict]) -> Grade:
    """Takes from `verdicts` what the plans' questions got."""
    parts: dict[str, float] = {}
    errors = []
    for plan in plans:
        answers = [next(verdicts) for _ in plan.questions]
        scores = [answer.score for answer in answers if answer.score is not None]
        if len(scores) == len(answers):
            parts |= plan.parts(scores)
        errors += [answer.error for answer in answers if answer.score is None]
    return Grade(None, errors[0]) if errors else Grade(parts)
