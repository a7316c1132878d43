"""Multi-hop: a fact that is found through others (the question-answering side of RULER, with facts made here).

    The friend of amber is wolf. The code of wolf is green.   ->   The code of the friend of amber is | green.

Level n goes through n friends. Beside the chains that are asked stands another one. Facts stand in any order; `depth`
is that of the code.
"""

from __future__ import annotations

from data.tasks.long.long_task import Ask, DoesNotFitError, Fact, LongProblem, LongTask, compose
from data.tasks.long.needle import draw_code, told
from data.tasks.long.vocabulary import NAMES, filler


def build(ask: Ask) -> LongProblem:
    chains, each = ask.questions + 1, ask.level + 1
    if chains * each > len(NAMES):
        raise DoesNotFitError
    left = list(NAMES)
    keys, facts, asked = [], [], []

    def unused() -> str:
        return ask.rng.choice(left)

    for number in range(chains):
        key, last, code = draw_code(ask, unused)
        left.remove(last)
        chain = [*ask.rng.sample(left, ask.level), last]
        left = [name for name in left if name not in chain]
        answer = told(last, code, ask.place() if number < ask.questions else ask.rng.random())
        friends = [
            Fact(f" The friend of {one} is {other}.", ask.rng.random())
            for one, other in zip(chain, chain[1:], strict=False)
        ]
        keys.append(key)
        facts += [*friends, answer]
        if number < ask.questions:
            asked.append((f"\nThe code of {'the friend of ' * ask.level}{chain[0]} is", f" {code}.", answer))
    return compose(ask, facts, ask.rng.sample(asked, len(asked)), keys, filler)


HOPS = LongTask("hops", build)
