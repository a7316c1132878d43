"""Variable tracking (RULER): who has a value, through assignments that copy it from one name to the next.

    amber = green. wolf = amber. coral = wolf.   ->   All that is green: | amber, wolf, coral.

Level n copies n times. Beside the chains that are asked stands another one. Assignments keep their order in the text;
`depth` is that of the first.
"""

from __future__ import annotations

from data.tasks.long.long_task import Ask, DoesNotFitError, Fact, LongProblem, LongTask, compose
from data.tasks.long.vocabulary import NAMES, VALUES, filler


def build(ask: Ask) -> LongProblem:
    chains, each = ask.questions + 1, ask.level + 1
    if chains * each > len(NAMES):
        raise DoesNotFitError
    names, values = list(NAMES), list(VALUES)  # those that no chain has yet
    keys, facts, asked = [], [], []

    def draw() -> tuple[str, tuple[str, list[str]]]:
        code, chain = ask.rng.choice(values), ask.rng.sample(names, each)
        return f"variables:{code}:{','.join(chain)}", (code, chain)

    for number in range(chains):
        key, (code, chain) = ask.draw(draw)
        values.remove(code)
        names = [name for name in names if name not in chain]
        first = ask.place() if number < ask.questions else 0.9 * ask.rng.random()
        places = [first, *ask.behind(first, ask.level)]
        said = [f" {chain[0]} = {code}.", *(f" {new} = {old}." for old, new in zip(chain, chain[1:], strict=False))]
        own = [Fact(sentence, place) for sentence, place in zip(said, places, strict=True)]
        keys.append(key)
        facts += own
        if number < ask.questions:
            asked.append((f"\nAll that is {code}:", f" {', '.join(chain)}.", own[0]))
    return compose(ask, facts, ask.rng.sample(asked, len(asked)), keys, filler)


VARIABLES = LongTask("variables", build, level=2)
