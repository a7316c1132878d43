"""In-context copying: a stretch of random words goes on as it went on before.

    ... amber wolf coral honey nest lily ...   ->   amber wolf coral | honey nest lily ...

Level n copies 4n words behind a cue of three, which occurs once. The simplest task that attention at a distance has to
solve, and the one that small models learn the others from.
"""

from __future__ import annotations

from data.tasks.long.long_task import Ask, DoesNotFitError, Fact, LongProblem, LongTask, compose
from data.tasks.long.vocabulary import NAMES

CUE, UNIT = 3, 4
REDRAWS = 20  # of a context in which a cue occurs again
ASKED_SHARE = 0.6  # denser than the other tasks


def build(ask: Ask) -> LongProblem:
    for _ in range(REDRAWS):
        problem = _drawn(ask)
        words = "".join(problem.context).split(" ")[1:]
        seen = [tuple(words[at : at + CUE]) for at in range(len(words) - CUE + 1)]
        cues = [tuple(question.prompt.split()) for question in problem.questions]
        if all(seen.count(cue) == 1 for cue in cues):
            return problem
    raise DoesNotFitError


def _drawn(ask: Ask) -> LongProblem:
    def draw() -> tuple[str, str]:
        found = " ".join(ask.rng.choices(NAMES, k=CUE + UNIT * ask.level))
        return f"copy:{found}", found

    keys, facts, asked = [], [], []
    for _ in range(ask.questions):
        key, found = ask.draw(draw)
        words = found.split()
        keys.append(key)
        facts.append(Fact(f" {found}", ask.place()))
        asked.append((f"\n {' '.join(words[:CUE])}", f" {' '.join(words[CUE:])}", facts[-1]))
    return compose(ask, facts, asked, keys, lambda rng: f" {rng.choice(NAMES)}", ASKED_SHARE)


COPY = LongTask("copy", build, level=2)
