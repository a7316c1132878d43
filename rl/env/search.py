"""Questions over several documents of an invented world, with `search` and `open`.

    1  Name the birthplace of the teacher of Kadelo.      two documents; the first hop is always the teacher
    2  Name the river of the seat of the employer of Kadelo.                   three
    3  Name the mayor of the larger of the birthplaces of Kadelo and Sanote.   four: two people, two towns

Each level has WORLDS worlds, made from level and number alone: people, towns and companies with names of two or three
syllables, a document each. The whole world of a question is always searchable, no other; held out are combinations of
world, entities and relations. Nothing can be guessed: the facts are permutations, so every candidate is the answer
equally often; a question has no word of its last document but those that all documents of the kind share; and no
document holds both an entity of the question and its answer. Nor is there much to learn by heart: the same question has
another answer in another world.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from data.calls import ToolCall
from data.tasks.copying import SYLLABLES
from rl.env.drawn import draw
from rl.env.environment import Environment, EnvProblem, Said, Solution
from rl.tools.tool import Tool

NAME_SYLLABLES = {1: 2, 2: 3, 3: 3}  # of a level: a tiny model copies two of them sooner than three
NUM_PEOPLE, NUM_TOWNS, NUM_COMPANIES = 400, 96, 96
WORLDS = 16
FIRST_ID = 100  # three digits for every document
RELATIONS = {  # kind -> relation -> kind of what it leads to
    "person": {"birthplace": "town", "employer": "company", "teacher": "person"},
    "town": {"mayor": "person", "river": "river"},
    "company": {"seat": "town", "founder": "person"},
}
WRITTEN = {  # how a document states it
    "birthplace": "{0} was born in {1}.",
    "employer": "{0} works for {1}.",
    "teacher": "{0} was taught by {1}.",
    "mayor": "The mayor of {0} is {1}.",
    "river": "{0} lies on the river {1}.",
    "seat": "{0} has its seat in {1}.",
    "founder": "{0} was founded by {1}.",
    "people": "{0} has {1} people.",
    "year": "{0} began in {1}.",
}
COMPARED = {"town": ("people", "smaller", "larger"), "company": ("year", "older", "younger")}  # number, less, more
STARTS = ("Search {}.", "Find {} first.", "Look for {}.")
OPENS = ("It is {}; open.", "Open {}.")
NEXTS = ("{} So search {}.", "{} Next {}.")
ENDS = ("{} That is it.", "{} Done.")


@dataclass(frozen=True)
class World:
    """facts: (entity, relation) -> another entity or a number; ids: entity -> its document; seen: entity -> the titles
    of the documents that name it."""

    kinds: dict[str, str]
    facts: dict[tuple[str, str], str]
    ids: dict[str, str]
    texts: dict[str, str]
    seen: dict[str, frozenset[str]]

    def sentence(self, entity: str, relation: str) -> str:
        return WRITTEN[relation].format(entity, self.facts[entity, relation])

    def guessable(self, entities: Sequence[str], answer: str) -> bool:
        """Whether one document gives an entity of the question away together with the answer."""
        return answer in entities or any(self.seen[entity] & self.seen[answer] for entity in entities)


@functools.lru_cache(maxsize=3 * WORLDS)
def world_of(level: int, number: int) -> World:
    """World `number` of a level, always the same."""
    rng = random.Random(f"search/{level}/{number}")
    spelled = ("".join(parts).capitalize() for parts in itertools.product(SYLLABLES, repeat=NAME_SYLLABLES[level]))
    names = [name for name in spelled if name != "Name"]  # every question begins with it
    found = iter(rng.sample(names, NUM_PEOPLE + 2 * NUM_TOWNS + NUM_COMPANIES))
    people, towns, rivers, companies = (
        list(itertools.islice(found, number)) for number in (NUM_PEOPLE, NUM_TOWNS, NUM_TOWNS, NUM_COMPANIES)
    )
    kinds = dict.fromkeys(people, "person") | dict.fromkeys(towns, "town") | dict.fromkeys(companies, "company")
    facts: dict[tuple[str, str], str] = {}

    def relate(sources: list[str], relation: str, targets: list[str]) -> None:
        """Each target as often as every other."""
        copies = targets * -(-len(sources) // len(targets))
        for source, target in zip(sources, rng.sample(copies, len(sources)), strict=True):
            facts[source, relation] = target

    relate(people, "birthplace", towns)
    relate(people, "employer", companies)
    circle = rng.sample(people, len(people))  # each teaches one, nobody themselves
    facts |= {(a, "teacher"): b for a, b in zip(circle, circle[1:] + circle[:1], strict=True)}
    relate(towns, "river", rivers)
    relate(towns, "mayor", rng.sample(people, NUM_TOWNS))
    relate(companies, "seat", towns)
    relate(companies, "founder", rng.sample(people, NUM_COMPANIES))
    relate(towns, "people", [str(number) for number in rng.sample(range(10_000, 100_000), NUM_TOWNS)])
    relate(companies, "year", [str(year) for year in rng.sample(range(1800, 2000), NUM_COMPANIES)])

    order = rng.sample(list(kinds), len(kinds))  # neither id nor place tells the kind
    told: dict[str, list[str]] = {}
    for entity, relation in facts:
        told.setdefault(entity, []).append(relation)
    texts = {
        entity: " ".join(WRITTEN[relation].format(entity, facts[entity, relation]) for relation in told[entity])
        for entity in order
    }
    seen: dict[str, set[str]] = {entity: {entity} for entity in order}
    for (entity, _), value in facts.items():
        seen.setdefault(value, set()).add(entity)
    ids = {entity: f"d{FIRST_ID + number}" for number, entity in enumerate(order)}
    return World(kinds, facts, ids, texts, {name: frozenset(titles) for name, titles in seen.items()})


@functools.lru_cache(maxsize=3 * WORLDS)
def corpus_of(level: int, number: int) -> Any:
    """The index of a world's documents, made once in a process."""
    from rl.tools.search import Corpus, Document

    world = world_of(level, number)
    return Corpus([Document(world.ids[name], world.kinds[name], text) for name, text in world.texts.items()])


def _make(rng: random.Random, level: int) -> EnvProblem | None:
    number = rng.randrange(WORLDS)
    world = world_of(level, number)
    pick = ""
    if level < 3:
        starts = [name for name, kind in world.kinds.items() if level > 1 or kind == "person"]
        entities = [rng.choice(starts)]
        path: list[str] = []
        kind, answer = world.kinds[entities[0]], entities[0]
        for hop in range(level + 1):
            last = hop == level
            options = [name for name, to in RELATIONS[kind].items() if last or to != "river"]
            path.append("teacher" if level == 1 and hop == 0 else rng.choice(options))
            kind, answer = RELATIONS[kind][path[-1]], world.facts[answer, path[-1]]
        asked = " of ".join(f"the {relation}" for relation in reversed(path)) + f" of {entities[0]}"
    else:
        entities = sorted(rng.sample([name for name, kind in world.kinds.items() if kind == "person"], 2))
        first = rng.choice(["birthplace", "employer"])
        kind = RELATIONS["person"][first]
        _, less, more = COMPARED[kind]
        pick = rng.choice([less, more])
        path = [first, rng.choice(list(RELATIONS[kind]))]
        a, b = (world.facts[entity, first] for entity in entities)
        if a == b:
            return None
        answer = world.facts[_picked(world, a, b, pick), path[1]]
        asked = f"the {path[1]} of the {pick} of the {first}s of {entities[0]} and {entities[1]}"
    if world.guessable(entities, answer):
        return None
    state = {"level": level, "world": number, "entities": entities, "path": path, "pick": pick}
    key = f"search:{level}:{number}:{'/'.join([*entities, *path, pick])}"
    return EnvProblem(f"Name {asked}.", answer, key, json.dumps(state))


def _picked(world: World, a: str, b: str, pick: str) -> str:
    """Which of two towns or companies is the larger, smaller, older or younger one."""
    number, less, _ = COMPARED[world.kinds[a]]
    low, high = sorted((a, b), key=lambda name: int(world.facts[name, number]))
    return low if pick == less else high


class SearchEnvironment(Environment):
    name = "search"
    max_level = 3

    def problem_at(self, index: int, split: str, seed: int, level: int, share: float) -> EnvProblem:
        return draw(self.name, _make, index, split, seed, level, share)

    def tools(self, problem: EnvProblem) -> list[Tool]:
        from rl.tools.search import Open, Search

        asked = json.loads(problem.state)
        corpus = corpus_of(asked["level"], asked["world"])
        search = Search(corpus, num_results=1)  # at level 1 nobody opens what a hit shows whole
        return [search] if asked["level"] == 1 else [search, Open(corpus)]

    async def verify(self, problem: EnvProblem, answer: str, tools: Sequence[Tool]) -> float:
        """1.0 for the name alone, letter by letter (spaces around it aside)."""
        return float(answer.strip() == problem.answer)

    def solve(self, problem: EnvProblem) -> Solution:
        """Searches each entity, from level 2 on opens its document (a hit shows a short one whole), and goes on with
        what that says. Without a document: no answer."""
        rng = random.Random(problem.prompt)
        asked = json.loads(problem.state)
        world = world_of(asked["level"], asked["world"])
        current, path = list(asked["entities"]), list(asked["path"])
        thought = rng.choice(STARTS).format(" and ".join(current))
        for hop, relation in enumerate(path):
            read = yield from _read(world, current, thought, rng if asked["level"] > 1 else None)
            if not read:
                return Said("The document is not found.")
            found = ""
            if hop == 1 and asked["pick"]:
                number = COMPARED[world.kinds[current[0]]][0]
                found = " ".join(world.sentence(entity, number) for entity in current)
                current = [_picked(world, current[0], current[1], asked["pick"])]
                found += f" The {asked['pick']} is {current[0]}. "
            found += " ".join(world.sentence(entity, relation) for entity in current)
            current = [world.facts[entity, relation] for entity in current]
            if hop < len(path) - 1:
                thought = rng.choice(NEXTS).format(found, " and ".join(current))
        return Said(rng.choice(ENDS).format(found), current[0])


def _read(
    world: World, entities: Sequence[str], thought: str, rng: random.Random | None
) -> Generator[Said, Sequence[str], bool]:
    """Searches the documents of `entities`, several at once, and opens them where there is an `rng`, which words it.
    False where one is not found."""
    searches = (ToolCall("search", {"query": entity}) for entity in entities)
    results = yield Said(thought, calls=tuple(searches))
    ids = [world.ids[entity] for entity in entities]
    if not all(one in result for one, result in zip(ids, results, strict=True)):
        return False
    if rng is None:
        return all(entity in result for entity, result in zip(entities, results, strict=True))
    opens = tuple(ToolCall("open", {"document": one}) for one in ids)
    pages = yield Said(rng.choice(OPENS).format(" and ".join(ids)), calls=opens)
    return all(entity in page for entity, page in zip(entities, pages, strict=True))
