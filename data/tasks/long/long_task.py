"""What every long-context task is: a context of any length with facts at chosen depths, and questions behind it.

The forms are RULER's (arXiv 2404.06654), in few words, so that a model of a few million parameters can learn them. As
there, a question ends with the beginning of its answer's sentence, so plain text continues into the answer. Two things
are added: a context may be asked several questions, which makes training dense in targets; and every fact has a key
that `data.split` decides by, so that no held-out fact stands in any training context.

Texts are cut into sentences that begin with a space or a line break: each is tokenised alone, so counts of tokens add
up, and with a tokenizer that never joins across a space (byte-level BPE) the ids are those of the whole text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from conf.errors import UserError
from data.split import in_split

MAX_DRAWS = 10_000  # draws for one fact before a split counts as empty
REDRAWS = 20  # of a problem whose words are too long for its budget
TRIES = 6  # sentences tried for the last gap of a context
ASKED_SHARE = 0.4  # of the budget: what several questions and their answers may take
Filler = Callable[[random.Random], str]
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """`depth`: share of the context before what answers it, 0 to 1; None where that is spread over the context."""

    prompt: str  # "\nThe code of amber is"
    answer: str  # " green."
    depth: float | None


@dataclass(frozen=True)
class LongProblem:
    """`context`: sentences; `keys`: of what must not be seen in both splits."""

    context: tuple[str, ...]
    questions: tuple[Question, ...]
    keys: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """Everything before the first answer."""
        return "".join(self.context) + self.questions[0].prompt

    @property
    def answer(self) -> str:
        return self.questions[0].answer


@dataclass(frozen=True)
class Ask:
    """One problem to make. `budget`: tokens of context, questions and answers; `depth` None: anywhere, each question's
    own; `count`: tokens of a text."""

    rng: random.Random
    budget: int
    depth: float | None
    count: Callable[[str], int]
    level: int = 1
    questions: int = 1
    split: str = "train"
    share: float = 0.1  # data.heldout

    def draw(self, make: Callable[[], tuple[str, T]]) -> tuple[str, T]:
        """Draws `make` until its key (the first of what it returns) lies in the split. UserError where none does.

        `make` draws all that the key is made of: of one name, a small split may hold no fact at all."""
        for _ in range(MAX_DRAWS):
            found = make()
            if self.holds(found[0]):
                return found
        raise self.empty()

    def holds(self, key: str) -> bool:
        """Whether the key lies in the split."""
        return in_split(key, self.split, self.share)

    def empty(self) -> UserError:
        return UserError(
            f"data.heldout={self.share:g} leaves no long-context fact in the {self.split} split: give a share nearer to"
            " 0.1"
        )

    def place(self) -> float:
        """Where a fact shall stand."""
        return self.rng.random() if self.depth is None else self.depth

    def behind(self, depth: float, count: int) -> list[float]:
        """`count` places after `depth`, ascending."""
        return sorted(depth + (1 - depth) * self.rng.random() for _ in range(count))


class Fact(NamedTuple):
    sentence: str
    depth: float  # where it shall stand


class DoesNotFitError(Exception):
    """Facts and questions are longer than the budget."""


@dataclass(frozen=True)
class LongTask:
    """`build` makes a problem, or raises DoesNotFitError. `level`: the default; `has_depth`: one place answers."""

    name: str
    build: Callable[[Ask], LongProblem]
    level: int = 1
    has_depth: bool = True

    def make(self, ask: Ask) -> LongProblem:
        """The problem; of several questions as many as fit. UserError where the budget holds not even one."""
        questions, redraws = ask.questions, REDRAWS
        while redraws:
            try:
                return self.build(replace(ask, questions=questions))
            except DoesNotFitError:  # the next try draws other words
                redraws -= questions == 1
                questions = max(1, questions * 2 // 3)
        raise UserError(f"{ask.budget} tokens hold no problem of {self.name}:{ask.level}: give a greater length")


def compose(
    ask: Ask,
    facts: Sequence[Fact],
    questions: Sequence[tuple[str, str, Fact | None]],
    keys: Sequence[str],
    filler: Filler,
    asked_share: float = ASKED_SHARE,
) -> LongProblem:
    """Hides `facts` in filler sentences so that all fits the budget; `questions`: (prompt, answer, the fact whose
    depth is reported). DoesNotFitError."""
    asked = sum(ask.count(prompt) + ask.count(answer) for prompt, answer, _ in questions)
    sizes = [ask.count(fact.sentence) for fact in facts]
    if asked + sum(sizes) > ask.budget or len(questions) > 1 and asked > asked_share * ask.budget:
        raise DoesNotFitError
    room = ask.budget - asked - sum(sizes)
    between = fill(ask, room, filler)
    total = sum(size for _, size in between)
    order = sorted(range(len(facts)), key=lambda i: facts[i].depth)
    context: list[str] = []
    depth: dict[Fact, float] = {}
    before = 0  # tokens of filler so far
    laid = 0  # tokens of the context so far
    whole = total + sum(sizes)
    rest = iter([*between, ("", 0)])
    for i in order:
        while before < round(facts[i].depth * total):
            sentence, size = next(rest)
            context.append(sentence)
            before, laid = before + size, laid + size
        context.append(facts[i].sentence)
        depth[facts[i]] = laid / max(1, whole - sizes[i])
        laid += sizes[i]
    context += [sentence for sentence, _ in rest if sentence]
    found = [Question(prompt, answer, None if fact is None else depth[fact]) for prompt, answer, fact in questions]
    return LongProblem(tuple(context), tuple(found), tuple(keys))


def fill(ask: Ask, room: int, filler: Filler) -> list[tuple[str, int]]:
    """Filler sentences of `room` tokens or slightly less, with the tokens of each."""
    found: list[tuple[str, int]] = []
    missed = 0
    while missed < TRIES:
        sentence = filler(ask.rng)
        size = ask.count(sentence)
        if size <= room:
            found.append((sentence, size))
            room -= size
        else:
            missed += 1
    return found
