"""Prompts of several domains: exact shares, any position at once, each domain in its own order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, count, islice

import pytest

from data.mixture import blocks, mixture
from data.prompts import Prompt

SHARES = {"a": 3.0, "b": 1.5, "c": 0.5}


def source(name: str) -> Callable[[int], Iterator[Prompt]]:
    return lambda start: (Prompt(f"{name}{n}", str(n), name, f"{name}{n}") for n in count(start))


def mixed(start: int = 0, seed: int = 0, block: int = 8) -> Iterator[Prompt]:
    return mixture({name: source(name) for name in SHARES}, SHARES, seed, block, start)


def test_shares_are_kept_in_every_block():
    """5 : 2.5 : 0.83 of eight would be; a domain is never a whole prompt ahead or two behind."""
    given: Counter[str] = Counter()
    for number, names in enumerate(islice(blocks(SHARES, 0, 8), 50), 1):
        given.update(names)
        for name, share in SHARES.items():
            assert abs(given[name] - number * 8 * share / 5) < 1
    assert given == {"a": 240, "b": 120, "c": 40}


def test_a_domain_meets_every_rank():
    """Ranks take every second prompt: two equal domains in turn would give each rank one of them."""
    names = list(islice(chain.from_iterable(blocks({"a": 1.0, "b": 1.0}, 0, 8)), 400))
    assert 60 < names[::2].count("a") < 140


def test_each_domain_keeps_its_order():
    found = list(islice(mixed(), 100))
    for name in SHARES:
        mine = [prompt.answer for prompt in found if prompt.domain == name]
        assert mine == [str(n) for n in range(len(mine))]
        assert {prompt.prompt[0] for prompt in found if prompt.domain == name} == {name}


@pytest.mark.parametrize("start", [1, 7, 8, 37])
def test_any_position_is_reached_at_once(start: int):
    assert list(islice(mixed(start), 40)) == list(islice(mixed(), start, start + 40))
    assert list(islice(mixed(seed=1), 40)) != list(islice(mixed(), 40))
