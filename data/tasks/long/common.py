"""Common words (RULER's aggregation): the words that a list holds most often, from the most common on.

    amber wolf amber coral amber wolf ...   ->   The most common words are | amber, wolf.

Level n asks for n. The list holds rare words c times each and the asked ones 2c, 3c, ... times, c growing with the
length. The answer is spread over the context, so there is no depth.
"""

from __future__ import annotations

from data.tasks.long.long_task import Ask, DoesNotFitError, LongProblem, LongTask, Question
from data.tasks.long.vocabulary import NAMES

RARE = 100  # different rare words at most


def build(ask: Ask) -> LongProblem:
    """However many questions are asked, there is one."""

    def draw() -> tuple[str, str]:
        found = ask.rng.sample(NAMES, ask.level)
        return f"common:{','.join(sorted(found))}", " ".join(found)

    key, drawn = ask.draw(draw)
    asked = drawn.split()
    prompt, answer = "\nThe most common words are", f" {', '.join(asked)}."
    room = ask.budget - ask.count(prompt) - ask.count(answer)
    sizes = {name: ask.count(f" {name}") for name in NAMES}
    times = dict(zip(asked, range(ask.level + 1, 1, -1), strict=True))
    often = sum(sizes[name] * count for name, count in times.items())
    others = ask.rng.sample([name for name in NAMES if name not in times], RARE)
    scale = max(1, room // (often + sum(sizes[name] for name in others)))
    counts = {name: count * scale for name, count in times.items()}
    left = room - often * scale
    for name in others:
        counts[name] = max(0, min(scale, left // sizes[name]))
        left -= counts[name] * sizes[name]
    if left < 0:
        raise DoesNotFitError
    for name in asked:  # the rest of the room; the gaps between the counts only grow
        if name is asked[0]:
            counts[name] += left // sizes[name]
    words = [f" {name}" for name, count in counts.items() for _ in range(count)]
    ask.rng.shuffle(words)
    return LongProblem(tuple(words), (Question(prompt, answer, None),), (key,))


COMMON = LongTask("common", build, level=2, has_depth=False)
