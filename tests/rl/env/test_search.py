"""The search environment: right by the documents alone, several documents needed, and nothing to be had by guessing."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections import Counter
from typing import Any

import pytest

from rl.env.environment import EnvProblem
from rl.env.registry import ENVIRONMENTS
from rl.env.search import COMPARED, WORLDS, WRITTEN, World, world_of
from tests.rl.env.test_environments import problems

LEVELS = [1, 2, 3]
SEARCH = ENVIRONMENTS["search"]


def world_of_problem(problem: EnvProblem) -> World:
    asked = json.loads(problem.state)
    return world_of(asked["level"], asked["world"])


def stated(texts: dict[str, str], entity: str, relation: str) -> str:
    """What the document of `entity` says."""
    pattern = re.escape(WRITTEN[relation]).replace(r"\{0\}", entity).replace(r"\{1\}", r"(\w+)")
    found = re.search(pattern, texts[entity])
    assert found is not None, (entity, relation)
    return found[1]


def by_reading(level: int, problem: EnvProblem) -> tuple[str, list[str]]:
    """(the answer, the documents read) from the question's words and the documents."""
    texts = world_of_problem(problem).texts
    words = problem.prompt.removeprefix("Name ").removesuffix(".").replace("the ", "").split(" of ")
    if level < 3:
        *relations, current = words
        read = []
        for relation in reversed(relations):
            read.append(current)
            current = stated(texts, current, relation)
        return current, read
    last, pick, first, pair = words
    a, b = pair.split(" and ")
    found = [stated(texts, one, first.removesuffix("s")) for one in (a, b)]
    number, less, more = next(entry for entry in COMPARED.values() if pick in entry)
    found.sort(key=lambda one: int(stated(texts, one, number)))
    chosen = {less: found[0], more: found[1]}[pick]
    return stated(texts, chosen, last), [a, b, *found]


@pytest.mark.parametrize("level", LEVELS)
def test_the_answer_follows_from_as_many_documents_as_the_level_asks_for(level: int) -> None:
    for problem in problems("search", level, 200):
        answer, read = by_reading(level, problem)
        assert answer == problem.answer
        assert len(read) == {1: 2, 2: 3, 3: 4}[level]


@pytest.mark.parametrize("level", LEVELS)
def test_no_document_holds_the_question_and_its_answer(level: int) -> None:
    for problem in problems("search", level, 200):
        texts = world_of_problem(problem).texts
        entities = [word for word in re.findall(r"\w+", problem.prompt) if word in texts]
        assert len(entities) == (2 if level == 3 else 1)
        for title, text in texts.items():
            words = set(re.findall(r"\w+", text)) | {title}
            assert not (problem.answer in words and words & set(entities)), problem.prompt


@pytest.mark.parametrize("level", LEVELS)
def test_documents_are_short_alike_and_all_there_for_held_out_questions(level: int) -> None:
    for problem in problems("search", level, 50, "heldout"):
        texts = world_of_problem(problem).texts
        assert len(texts) == 592 and {text.count(".") for text in texts.values()} == {3}
        assert max(len(text) for text in texts.values()) < 160
        assert set(by_reading(level, problem)[1]) <= set(texts)
    worlds = [world_of(level, number).texts for level in LEVELS for number in range(WORLDS)]
    assert all(a != b for a, b in itertools.combinations(worlds, 2))


def test_the_same_question_has_another_answer_in_another_world() -> None:
    found: dict[str, set[str]] = {}
    for problem in problems("search", 1, 3000):
        found.setdefault(problem.prompt, set()).add(problem.answer)
    several = [answers for answers in found.values() if len(answers) > 1]
    assert len(several) > 500


@pytest.mark.parametrize("level", LEVELS)
def test_a_guess_is_hardly_ever_right(level: int) -> None:
    """The best constant, and the best for the relation that is asked for, by what training shows."""
    trained, held = problems("search", level, 1500), problems("search", level, 400, "heldout")

    def relation(prompt: str) -> str:
        return prompt.split(" ")[2]

    counts: dict[str, Counter[str]] = {}
    for problem in trained:
        counts.setdefault(relation(problem.prompt), Counter())[problem.answer] += 1
        counts.setdefault("", Counter())[problem.answer] += 1
    best = {key: found.most_common(1)[0][0] for key, found in counts.items()}
    assert sum(problem.answer == best[""] for problem in held) / len(held) < 0.05
    assert sum(problem.answer == best.get(relation(problem.prompt)) for problem in held) / len(held) < 0.05


@pytest.mark.parametrize("level", LEVELS)
def test_searching_the_question_finds_its_last_document_no_more_often_than_chance(level: int) -> None:
    """Chance: ten of the documents of its kind; the question's words tell the kind, and no more."""

    async def hits(num: int) -> tuple[float, float]:
        found = expected = 0.0
        for problem in problems("search", level, num, seed=5):
            tools: dict[str, Any] = {tool.name: tool for tool in SEARCH.tools(problem)}
            world, read = world_of_problem(problem), by_reading(level, problem)[1]
            last = next(title for title in reversed(read) if problem.answer in world.texts[title])
            page = await tools["search"].call(query=problem.prompt, num_results=10)
            found += f"[{world.ids[last]}]" in page
            expected += 10 / Counter(world.kinds.values())[world.kinds[last]]
        return found / num, expected / num

    found, expected = asyncio.run(hits(300))
    assert found < expected + 0.06, (found, expected)  # three standard deviations of 300 draws


def test_without_a_document_there_is_no_answer() -> None:
    problem = problems("search", 1, 1)[0]
    solution = SEARCH.solve(problem)
    said = next(solution)
    assert said.calls[0].name == "search"
    with pytest.raises(StopIteration) as stopped:
        solution.send(["No document matches."])
    assert stopped.value.value.content == ""
