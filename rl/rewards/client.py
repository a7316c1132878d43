"""Asks a judge, an OpenAI-compatible endpoint: retries, deadlines, cache and budget.

Every request leaves from a process of its own (`chat.py`, `rl.judge_workers` of them), not from a thread: a thread
that hangs in a name look-up, a handshake or a reply that trickles in cannot be ended, a process can. It gives up after
`rl.judge_timeout_s` by itself and is killed KILL_AFTER_S later.

Requests that failed for the moment (429, 5xx, no connection, no reply in time) are asked again together, up to
`rl.judge_retries` times, after a pause that doubles, with jitter, and that is no shorter than Retry-After. What is left
without a score is a failure with its reason, never a 0. A question asked before in this run, or twice at once, is asked
once.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from conf.schema import RLConfig
from rl.keys import read_key
from rl.rewards.ledger import Ledger
from rl.rewards.processes import WorkerPool

BACKOFF_S = 0.5  # before the first repetition; doubles with each
LONGEST_PAUSE_S = 60.0
KILL_AFTER_S = 2.0  # past its deadline


@dataclass(frozen=True)
class Question:
    """`score` reads the reply; it raises ValueError, with a reason, where that holds no score."""

    prompt: str
    score: Callable[[str], float]


@dataclass(frozen=True)
class Verdict:
    """A score, or None and why there is none."""

    score: float | None
    error: str | None = None


class JudgeClient:
    """A context manager. UserError where the key's variable is empty or holds what is no key."""

    def __init__(self, rl: RLConfig, folder: Path, rank: int, world: int) -> None:
        assert rl.judge_url is not None and rl.judge_model is not None, "conf.validate lets no such run start"
        read_key("rl.judge_key_env", rl.judge_key_env, "an endpoint")
        self.rl, self.url, self.model = rl, rl.judge_url.rstrip("/"), rl.judge_model
        self.ledger = Ledger(folder / f"judge.rank_{rank}.jsonl")
        budget = rl.judge_budget
        self.budget = None if budget is None else (budget + world - 1 - rank) // world  # this rank's share
        self.counts = {"requests": 0, "cached": 0, "failures": 0}
        self.jitter = random.Random()  # noqa: S311  (of pauses: it changes no number)
        self.pool = WorkerPool(["rl.rewards.chat"], rl.judge_workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.close()

    def take_counts(self) -> dict[str, float]:
        """Requests sent, questions answered from the cache and questions left without a score, since the last call."""
        taken = {f"judge/{name}": float(count) for name, count in self.counts.items()}
        self.counts = dict.fromkeys(self.counts, 0)
        return taken

    def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        """One verdict a question, in their order."""
        keys = [self._key(question) for question in questions]
        pending = dict(zip(keys, questions, strict=True))
        verdicts = {key: Verdict(self.ledger.scores[key]) for key in pending if key in self.ledger.scores}
        pauses = {key: 0.0 for key in pending if key not in verdicts}
        self.counts["cached"] += len(keys) - len(pauses)
        for attempt in range(self.rl.judge_retries + 1):
            pauses = self._round(attempt, pauses, pending, verdicts)
        self.counts["failures"] += sum(verdict.score is None for verdict in verdicts.values())
        return [verdicts[key] for key in keys]

    def _round(
        self, attempt: int, pauses: dict[str, float], pending: dict[str, Question], verdicts: dict[str, Verdict]
    ) -> dict[str, float]:
        """Sends the questions in `pauses` once and settles what can be settled; the others with their next pauses."""
        left = len(pauses) if self.budget is None else max(0, self.budget - self.ledger.spent)
        keys = sorted(pauses, key=lambda key: pauses[key])
        for key in keys[left:]:
            reason = f"judge: rl.judge_budget={self.rl.judge_budget} requests are used up (this rank's: {self.budget})"
            verdicts[key] = Verdict(None, reason)
        keys = keys[:left]
        if not keys:
            return {}
        self.ledger.spend(len(keys))
        self.counts["requests"] += len(keys)
        now = time.monotonic()
        jobs = [self._job(pending[key], now + pauses[key]) for key in keys]
        limits = [pauses[key] + self.rl.judge_timeout_s + KILL_AFTER_S for key in keys]
        again: dict[str, float] = {}
        for key, answer in zip(keys, self.pool.run(jobs, limits), strict=True):
            if "text" in answer:
                verdicts[key] = self._read(key, pending[key], answer["text"])
            elif attempt < self.rl.judge_retries and (answer.get("killed") or answer.get("retry")):
                pause = BACKOFF_S * 2**attempt * self.jitter.uniform(0.5, 1.5)
                again[key] = min(max(pause, answer.get("after_s") or 0.0), LONGEST_PAUSE_S)
            else:
                verdicts[key] = Verdict(None, f"judge: {answer['error']}")
        return again

    def _read(self, key: str, question: Question, reply: str) -> Verdict:
        try:
            score = question.score(reply)
        except ValueError as error:  # the judge's nonsense
            self.ledger.fail(key, str(error), reply)
            return Verdict(None, f"judge: {error}")
        self.ledger.settle(key, score, reply)
        return Verdict(score)

    def _job(self, question: Question, not_before: float) -> dict[str, Any]:
        rl = self.rl
        where = {"url": self.url, "model": self.model, "key_env": rl.judge_key_env}
        return where | {"prompt": question.prompt, "timeout_s": rl.judge_timeout_s, "not_before": not_before}

    def _key(self, question: Question) -> str:
        return hashlib.sha256(json.dumps([self.model, question.prompt]).encode()).hexdigest()


def open_judge(rl: RLConfig, folder: Path, rank: int, world: int) -> AbstractContextManager[JudgeClient | None]:
    """The run's judge, or None where no reward needs one."""
    return JudgeClient(rl, folder, rank, world) if rl.needs_judge else nullcontext(None)
