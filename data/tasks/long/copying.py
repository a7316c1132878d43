"""In-context copying: random words go on as they went on before.

    copy     ... amber wolf coral honey nest lily ...   ->   amber wolf coral | honey nest lily ...
    repeat   amber icy coral                            ->   | amber icy coral

copy:N copies 4N words behind a cue of three, which occurs once. `repeat` says the whole context over again, in training
up to three times (no more than `ask.questions`): the densest in targets, and on a few words the first thing that a
small model learns at all. The other tasks come quickly behind it, and hardly without it (docs/log.md).
"""

from __future__ import annotations

from data.tasks.long.long_task import Ask, DoesNotFitError, Fact, LongProblem, LongTask, Question, compose
from data.tasks.long.vocabulary import NAMES, VALUES

CUE, UNIT = 3, 4
REDRAWS = 20  # of a context in which a cue occurs again
ASKED_SHARE = 0.6  # denser than the other tasks
MOST_TIMES = 3  # that a context is said again
WORDS = NAMES + VALUES


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


def repeat(ask: Ask) -> LongProblem:
    times = ask.rng.randint(1, min(ask.questions, MOST_TIMES))
    size = (ask.budget - times * ask.count("\n")) // (times + 1)

    def draw() -> tuple[str, str]:
        text, left = "", size
        while (left := left - ask.count(word := f" {ask.rng.choice(WORDS)}")) >= 0:
            text += word
        return f"repeat:{text}", text

    key, text = ask.draw(draw)
    if not text:
        raise DoesNotFitError
    return LongProblem((text,), (Question("\n", text, None),) * times, (key,))


COPY = LongTask("copy", build, level=2)
REPEAT = LongTask("repeat", repeat, has_depth=False)
