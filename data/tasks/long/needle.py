"""Needles: facts of one form in a haystack (RULER's single needle, multi-query and multi-value).

    The code of amber is green.   ->   The code of amber is | green.
    needle:2 has numbers of four digits for codes; with a token a digit they are four times as long, and harder.
    queries:N asks N of them at once:  The codes of amber, wolf are | green, icy.
    values:N gives a name N codes:     All codes of amber are | green, icy.

`depth` is that of the first fact that the answer needs; the others stand anywhere (values: behind it, and the answer
names them in the order of the text).
"""

from __future__ import annotations

from data.tasks.long.long_task import Ask, Fact, LongProblem, LongTask, compose
from data.tasks.long.vocabulary import NAMES, filler, value


def codes(
    ask: Ask, names: list[str], places: list[float], number: bool = False
) -> tuple[list[str], list[str], list[Fact]]:
    """(keys, values, facts) of names at places; no fact twice."""
    drawn: list[tuple[str, str]] = []
    for name in names:
        while (found := draw_code(ask, name, number)) in drawn:
            continue
        drawn.append(found)
    facts = [
        Fact(f" The code of {name} is {code}.", place)
        for name, (_, code), place in zip(names, drawn, places, strict=True)
    ]
    return [key for key, _ in drawn], [code for _, code in drawn], facts


def draw_code(ask: Ask, name: str, number: bool = False) -> tuple[str, str]:
    """(key, value) of a name, in the split."""

    def draw() -> tuple[str, str]:
        code = value(ask.rng, number)
        return f"code:{name}={code}", code

    return ask.draw(draw)


def single(ask: Ask) -> LongProblem:
    names = ask.rng.sample(NAMES, min(ask.questions, len(NAMES)))
    keys, values, facts = codes(ask, names, [ask.place() for _ in names], ask.level == 2)
    asked = [(f"\nThe code of {names[i]} is", f" {values[i]}.", facts[i]) for i in range(len(names))]
    return compose(ask, facts, ask.rng.sample(asked, len(asked)), keys, filler)


def queries(ask: Ask) -> LongProblem:
    """Further questions ask the same facts in other orders."""
    names = ask.rng.sample(NAMES, ask.level)
    keys, values, facts = codes(ask, names, [ask.place(), *(ask.rng.random() for _ in names[1:])])
    asked = []
    for number in range(ask.questions):
        order = list(range(ask.level))
        if number:
            ask.rng.shuffle(order)
        said = ", ".join(names[i] for i in order)
        asked.append((f"\nThe codes of {said} are", f" {', '.join(values[i] for i in order)}.", facts[order[0]]))
    return compose(ask, facts, asked, keys, filler)


def multiple(ask: Ask) -> LongProblem:
    keys: list[str] = []
    facts: list[Fact] = []
    asked = []
    for name in ask.rng.sample(NAMES, min(ask.questions, len(NAMES))):
        first = ask.place()
        own, values, said = codes(ask, [name] * ask.level, [first, *ask.behind(first, ask.level - 1)])
        keys, facts = keys + own, facts + said
        asked.append((f"\nAll codes of {name} are", f" {', '.join(values)}.", said[0]))
    return compose(ask, facts, ask.rng.sample(asked, len(asked)), keys, filler)


NEEDLE = LongTask("needle", single)
QUERIES = LongTask("queries", queries, level=3)
VALUES = LongTask("values", multiple, level=2)
