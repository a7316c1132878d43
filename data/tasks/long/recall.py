"""Key-value recall: a needle among needles of its own form (RULER's multi-key needles).

    amber: green. wolf: icy. ...   ->   amber: | green.

Level 1: names of one word, at most 64 pairs, in half the room that questions leave; the rest is filler. Level 2: names
of two words, and pairs fill the whole context; of three words where that has room for too many pairs.
"""

from __future__ import annotations

from dataclasses import replace

from data.tasks.long.long_task import Ask, Fact, LongProblem, LongTask, compose
from data.tasks.long.needle import draw_code
from data.tasks.long.vocabulary import NAMES, filler

MOST_PAIRS = 64
PAIR_TOKENS = 4  # at least: two words, a colon, a value


def build(ask: Ask) -> LongProblem:
    names: set[str] = set()
    keys: dict[str, str] = {}  # of every pair drawn, by its sentence
    crowded = ask.level == 2 and ask.budget > PAIR_TOKENS * len(NAMES) ** 2 // 2
    num_words = ask.level + crowded

    def unused() -> str:
        while (name := " ".join(ask.rng.choice(NAMES) for _ in range(num_words))) in names:
            continue
        return name

    def pair() -> tuple[str, str]:
        """(name, value) of a name that has none yet."""
        key, name, code = draw_code(ask, unused)
        names.add(name)
        keys[_sentence(name, code)] = key
        return name, code

    asked = []
    for name, code in (pair() for _ in range(min(ask.questions, MOST_PAIRS))):
        asked.append((f"\n{name}:", f" {code}.", Fact(_sentence(name, code), ask.place())))
    facts = [fact for _, _, fact in asked]
    if ask.level == 1:
        room = (ask.budget - sum(ask.count(prompt + answer) * 2 for prompt, answer, _ in asked)) // 2
        while len(facts) < MOST_PAIRS and (room := room - ask.count(_sentence(*(found := pair())))) >= 0:
            facts.append(Fact(_sentence(*found), ask.rng.random()))
    others = filler if ask.level == 1 else lambda _: _sentence(*pair())
    problem = compose(ask, facts, ask.rng.sample(asked, len(asked)), (), others)
    return replace(problem, keys=tuple(keys[sentence] for sentence in problem.context if sentence in keys))


def _sentence(name: str, code: str) -> str:
    return f" {name}: {code}."


KV = LongTask("kv", build)
