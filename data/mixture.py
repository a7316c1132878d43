"""Several streams of prompts in one, each with its share (mixed RL, DeepSeek-V3.2, sec. 3: all domains in one stage).

The shares are kept exactly: whenever a prompt is due, the domain that is furthest behind its share gives it. Inside a
block, which is an iteration, the order is shuffled, so that no rank gets more of a domain than chance gives it.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from data.prompts import Prompt


def blocks(shares: Mapping[str, float], seed: int, block: int) -> Iterator[list[str]]:
    """Names of the domains that give the next `block` prompts, forever."""
    total = sum(shares.values())
    given: Counter[str] = Counter()
    for number in itertools.count():
        names = []
        for _ in range(block):
            due = sum(given.values()) + 1
            name = max(shares, key=lambda name: due * shares[name] / total - given[name])
            given[name] += 1
            names.append(name)
        random.Random(f"domains/{seed}/{number}").shuffle(names)
        yield names


def mixture(
    sources: Mapping[str, Callable[[int], Iterator[Prompt]]],
    shares: Mapping[str, float],
    seed: int,
    block: int,
    start: int = 0,
) -> Iterator[Prompt]:
    """Prompts from number `start` on, without end. `sources`: by name, the number of a first prompt -> the prompts from
    there on."""
    order = itertools.chain.from_iterable(blocks(shares, seed, block))
    used = Counter(itertools.islice(order, start))
    streams = {name: source(used[name]) for name, source in sources.items()}
    for name in order:
        yield next(streams[name])
