"""Needles: facts of one form in a haystack (RULER's single needle, multi-query and multi-value).

    The code of amber is green.   ->   The code of amber is | green.
    needle:2 has numbers of four digits for codes; with a token a digit they are four times as long, and harder.
    queries:N asks N of them at once:  The codes of amber, wolf are | green, icy.
    values:N gives a name N codes:     All codes of amber are | green, icy.

`depth` is that of the first fact that the answer needs; the others stand anywhere (values: behind it, and the answer
names them in the order of the text).
"""

from __future__ import annotations

from collections.abc import Callable

from data.tasks.long.long_task import Ask, Fact, LongProblem, LongTask, compose
from data.tasks.long.vocabulary import NAMES, filler, value
from data.tasks.long.vocabulary import VALUES as CODES

MOST_NAMES = len(NAMES) // 2  # in one context, so that a small split still has facts of those left


def draw_code(ask: Ask, name: Callable[[], str], number: bool = False) -> tuple[str, str, str]:
    """(key, name, value) of a fact in the split; `name` draws one that has no fact yet."""

    def draw() -> tuple[str, tuple[str, str]]:
        who, code = name(), value(ask.rng, number)
        return fact_key(who, code), (who, code)

    key, (who, code) = ask.draw(draw)
    return key, who, code


def fact_key(name: str, code: str) -> str:
    return f"code:{name}={code}"


def told(name: str, code: str, place: float) -> Fact:
    return Fact(f" The code of {name} is {code}.", place)


def codes(ask: Ask, places: list[float], number: bool = False) -> tuple[list[str], list[str], list[str], list[Fact]]:
    """(keys, names, values, facts) at places; every name has one."""
    left = list(NAMES)
    found = []
    for _ in places:
        found.append(draw_code(ask, lambda: ask.rng.choice(left), number))
        left.remove(found[-1][1])
    keys, names, values = (list(column) for column in zip(*found, strict=True))
    return keys, names, values, [told(*fact) for fact in zip(names, values, places, strict=True)]


def single(ask: Ask) -> LongProblem:
    places = [ask.place() for _ in range(min(ask.questions, MOST_NAMES))]
    keys, names, values, facts = codes(ask, places, ask.level == 2)
    asked = [(f"\nThe code of {names[i]} is", f" {values[i]}.", facts[i]) for i in range(len(names))]
    return compose(ask, facts, ask.rng.sample(asked, len(asked)), keys, filler)


def queries(ask: Ask) -> LongProblem:
    """Further questions ask the same facts in other orders."""
    keys, names, values, facts = codes(ask, [ask.place(), *(ask.rng.random() for _ in range(ask.level - 1))])
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
    for name in ask.rng.sample(NAMES, len(NAMES)):
        known = [code for code in CODES if ask.holds(fact_key(name, code))]
        if len(known) < ask.level:  # a small split has few facts of a name
            continue
        first, values = ask.place(), ask.rng.sample(known, ask.level)
        said = [told(name, *fact) for fact in zip(values, [first, *ask.behind(first, ask.level - 1)], strict=True)]
        keys += [fact_key(name, code) for code in values]
        facts += said
        asked.append((f"\nAll codes of {name} are", f" {', '.join(values)}.", said[0]))
        if len(asked) == ask.questions:
            break
    if not asked:
        raise ask.empty()
    return compose(ask, facts, ask.rng.sample(asked, len(asked)), keys, filler)


NEEDLE = LongTask("needle", single)
QUERIES = LongTask("queries", queries, level=3)
VALUES = LongTask("values", multiple, level=2)
