"""Generated tasks: what they generate is graded right and what is changed wrong, no key crosses the split, levels grow
harder; the countdown parser against hostile text."""

from __future__ import annotations

import ast
import operator
import re
import time
from fractions import Fraction
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import UserError
from conf.schema import TASK_LEVELS, DataConfig
from data.prompts import prompts
from data.sources import TOKENIZER_PROBLEMS, documents, question_key, tokenizer_corpus
from data.split import is_heldout
from data.tasks import TASKS, choose, heldout_problems, mixed_problems, task_key
from data.tasks.countdown import evaluate, grade, make_problem, parse_prompt

NAMES = list(TASKS)
ANY_LEVEL = st.sampled_from([(name, level) for name, most in TASK_LEVELS.items() for level in range(1, most + 1)])
ALL = ("words:2", "sorting", "countdown", "counting", "copying", "arithmetic:3")


def test_the_configuration_knows_them_all() -> None:
    assert set(TASKS) == set(TASK_LEVELS) and len(TASKS) >= 5
    assert all(task.name == name for name, task in TASKS.items())


SPLIT = st.sampled_from(["train", "heldout"])


@settings(max_examples=150, deadline=None)
@given(chosen=ANY_LEVEL, seed=st.integers(0, 10**6), index=st.integers(0, 10**9), split=SPLIT)
def test_what_is_generated_is_right_and_on_its_side(chosen: tuple[str, int], seed: int, index: int, split: str) -> None:
    name, level = chosen
    task = TASKS[name]
    problem = task.problem_at(index, split, seed, level, 0.1)
    assert problem == task.problem_at(index, split, seed, level, 0.1)
    assert task.grade(problem.answer, problem.answer, problem.prompt) == 1.0
    assert task.grade(f" {problem.answer}\n", problem.answer, problem.prompt) == 1.0
    assert task.prompt_key(problem.prompt) == problem.key == task_key(problem.prompt) == question_key(problem.prompt)
    assert is_heldout(problem.key, 0.1) == (split == "heldout")
    assert problem.working and problem.prompt.isascii() and problem.working.isascii()


@settings(max_examples=150, deadline=None)
@given(chosen=ANY_LEVEL, index=st.integers(0, 10**6), data=st.data())
def test_a_changed_answer_is_wrong(chosen: tuple[str, int], index: int, data: st.DataObject) -> None:
    name, level = chosen
    task = TASKS[name]
    problem = task.problem_at(index, "train", 0, level, 0.1)
    numbers = [match.span() for match in re.finditer("[0-9]+", problem.answer)]
    if not numbers:
        return  # a name to be copied
    start, stop = data.draw(st.sampled_from(numbers))
    other = int(problem.answer[start:stop]) + data.draw(st.sampled_from([-1, 1, 10, 1000]))
    changed = f"{problem.answer[:start]}{other}{problem.answer[stop:]}"
    if name == "countdown" and evaluate(changed, parse_prompt(problem.prompt)[1]) is not None:  # type: ignore[index]
        return  # another number of the problem; whether it is right is the brute-force test's matter
    assert task.grade(changed, problem.answer, problem.prompt) == 0.0
    assert task.grade("", problem.answer, problem.prompt) == 0.0
    assert task.grade(problem.answer + "1", problem.answer, problem.prompt) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_train_and_heldout_share_no_key(name: str) -> None:
    task = TASKS[name]
    for level in (1, 2):
        trained = {problem.key for problem in islice(task.problems("train", 3, level), 2000)}
        held = {problem.key for problem in islice(task.problems("heldout", 3, level), 200)}
        assert trained and held and not trained & held


@pytest.mark.parametrize("name", NAMES)
def test_levels_grow_harder(name: str) -> None:
    """By the length of the worked solution, and by that of the prompt."""
    working, prompt = [], []
    for level in range(1, TASK_LEVELS[name] + 1):
        found = list(islice(TASKS[name].problems("train", 0, level), 60))
        working.append(sum(len(problem.working) for problem in found) / 60)
        prompt.append(sum(len(problem.prompt) for problem in found) / 60)
    assert working == sorted(set(working)), working
    assert prompt == sorted(set(prompt)), prompt


@pytest.mark.parametrize("name", ["words", "countdown"])
def test_every_step_of_the_working_is_true_and_leads_to_the_answer(name: str) -> None:
    for level in range(1, TASK_LEVELS[name] + 1):
        for problem in islice(TASKS[name].problems("train", 1, level), 50):
            steps = [step.split("=") for step in problem.working.split(",")]
            assert len(steps) == level
            assert all(by_python(left) == int(right) for left, right in steps)
            last = int(steps[-1][1])
            assert last == (int(problem.answer) if name == "words" else parse_prompt(problem.prompt)[0])  # type: ignore[index]


def test_sorting_counting_and_copying_by_other_means() -> None:
    for problem in islice(TASKS["sorting"].problems("train", 0, 4), 50):
        assert problem.answer == ",".join(sorted(problem.prompt[5:].split(","), key=int))
        assert [step.split(">")[1] for step in problem.working.split(" ")] == problem.answer.split(",")
    for problem in islice(TASKS["counting"].problems("train", 0, 4), 50):
        letter, text = problem.prompt.removeprefix("count ").split(": ")
        assert int(problem.answer) == text.count(letter) == int(problem.working.split(" ")[-1][1:])
    for problem in islice(TASKS["copying"].problems("train", 0, 3), 50):
        assert problem.prompt == f"say {problem.answer}" and len(problem.answer.split(" ")) == 3
    answers = [problem.answer for problem in islice(TASKS["counting"].problems("train", 0, 1), 500)]
    assert max(map(answers.count, set(answers))) < 300  # no answer is right more often than not by much


def test_keys_forget_what_does_not_matter() -> None:
    assert task_key("sort 3,1,2") == task_key("sort 2,3,1 ") != task_key("sort 2,3,3")
    assert task_key("count a: a b c") == task_key("count a: c b a") != task_key("count b: a b c")
    assert task_key("make 8 from 3,5") == task_key("make 8 from 5,3") != task_key("make 2 from 5,3")
    ann = "Ann has 12 pens. Ann gets 3 more. Ann loses 5. How many pens?"
    ben = "Ben has 12 eggs. Ben finds 3 more. Ben sells 5. How many eggs?"
    assert task_key(ann) == task_key(ben) == "words:12+3-5"
    for other in (
        "sort",
        "sort 1,a",
        "count aa: b",
        "make from 3",
        "Ann has 12 pens.",
        "Ann eats 3. How many?",
        "say",
        "say it",
        "",
    ):
        assert task_key(other) is None


def test_sorting_takes_spaces_for_commas() -> None:
    good = ["1,2,10", "1, 2, 10", "1 2 10", " 1,2 ,10\n"]
    bad = ["1,10,2", "1,2", "1,2,10,10", "1;2;10", "12,10", "1,2,10" + "0" * 10**6, "١,٢,١٠"]
    sort = TASKS["sorting"].grade
    assert [sort(text, "1,2,10", "sort 10,2,1") for text in good + bad] == [1.0] * len(good) + [0.0] * len(bad)


# Countdown: the grader against Python's own parser, and against hostile text


def by_python(text: str) -> Fraction | None:
    """The value of an expression by `ast`, for text that this file makes."""

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(node.value)  # type: ignore[arg-type]
        assert isinstance(node, ast.BinOp)
        left, right = value(node.left), value(node.right)
        kinds = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
        return kinds[type(node.op)](left, right)

    try:
        return value(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        return None


def expressions(numbers: list[int]) -> st.SearchStrategy[str]:
    """Expressions over all of `numbers` in this order, with parentheses anywhere."""
    if len(numbers) == 1:
        return st.just(str(numbers[0]))

    @st.composite
    def split(draw: st.DrawFn) -> str:
        cut = draw(st.integers(1, len(numbers) - 1))
        left, right = draw(expressions(numbers[:cut])), draw(expressions(numbers[cut:]))
        text = f"{left}{draw(st.sampled_from('+-*/'))}{right}"
        return f"({text})" if draw(st.booleans()) else text

    return split()


@settings(max_examples=300, deadline=None)
@given(numbers=st.lists(st.integers(0, 20), min_size=1, max_size=6), data=st.data())
def test_the_parser_agrees_with_pythons(numbers: list[int], data: st.DataObject) -> None:
    text = data.draw(expressions(numbers))
    expected = by_python(text)
    assert evaluate(text, numbers) == expected
    assert evaluate(text.replace("+", " + "), numbers[::-1]) == expected
    assert evaluate(text, numbers[:-1]) is None  # one number too many
    if expected is not None and expected >= 0 and expected.denominator == 1 and expected < 10**6:
        prompt = f"make {expected} from {','.join(map(str, numbers))}"
        assert grade(text, "", prompt) == 1.0 and grade(f"{text}+1", "", prompt) == 0.0


def test_any_way_to_the_target_is_right() -> None:
    prompt = "make 24 from 8,3,4,6"
    for text in ("8*3", "(8-4)*6", " 4 * 6 ", "(((3*8)))", "4*(8-6/3)", "8*6*(4-3)/(1+1)"):
        right = by_python(text.strip()) == 24 and "1" not in text
        assert grade(text, "8*3", prompt) == float(right), text
    assert grade("24", "8*3", prompt) == 0.0 and grade("8*3+4-4", "8*3", prompt) == 0.0  # 4 is there once
    assert grade("8/(3-8/3)", "", "make 24 from 3,3,8,8") == 1.0  # through fractions


HOSTILE = {
    "nothing": "",
    "spaces": "   ",
    "deep nesting": "(" * 10**6 + "8" + ")" * 10**6,
    "short deep nesting": "(" * 190 + "8" + ")" * 190,
    "open": "(8*3",
    "closed": "8*3)",
    "empty parentheses": "()8*3",
    "huge power": "8**3",
    "tower": "9**9**9**9",
    "caret": "8^3",
    "shift": "8<<3",
    "floor division": "8//3",
    "modulo": "8%3",
    "huge number": "9" * 10**6,
    "long number": "8" * 300,
    "leading zeros": "0" * 300 + "8*3",
    "float": "8.0*3",
    "exponent": "8e0*3",
    "hex": "0x8*3",
    "underscore": "8_*3",
    "sign": "-8*-3",
    "unary plus": "+8*3",
    "unicode digits": "８*３",
    "arabic digits": "٨*٣",
    "superscript": "8²",
    "unicode operators": "8×3",
    "no operator": "8 3",
    "two operators": "8*/3",
    "trailing": "8*3*",
    "call": "__import__('os').system('true')",
    "name": "8*x",
    "division by zero": "8/(3-3)",
    "division by a zero of distinct numbers": "6/(8-4-4)",
    "equation": "8*3=24",
    "lines": "8*3\n8*3",
    "null": "8*3\0",
    "tab": "8\t*3",
    "10 MB": "8*3+" * 2_500_000,
    "10 MB of spaces": " " * 10_000_000 + "8*3",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_answers_are_wrong_and_cheap(text: str) -> None:
    expected = 1.0 if text == HOSTILE["short deep nesting"] else 0.0
    start = time.perf_counter()
    assert grade(text, "8*3", "make 8 from 8,2" if expected else "make 24 from 8,3,4,6") == expected
    assert time.perf_counter() - start < 0.1


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(max_size=500), st.text("0123456789+-*/() ", max_size=420)))
def test_no_text_breaks_the_grader(text: str) -> None:
    assert grade(text, "", "make 24 from 8,3,4,6") in (0.0, 1.0)


def test_a_prompt_of_another_form_is_no_wrong_answer() -> None:
    for prompt in ("make 24", "what is 3+4?", "make 24 from " + ",".join(["1"] * 5000), "x" * 10**7):
        with pytest.raises(ValueError, match="is no countdown problem"):
            grade("8*3", "8*3", prompt)
    assert make_problem([8, 3], 24, "8*3", "8*3=24").prompt == "make 24 from 8,3"


# Mixes: prompts and text


def test_a_mix_is_even_and_reached_at_once() -> None:
    chosen = choose(ALL, 2)
    assert [one.level for one in chosen] == [2, 1, 1, 1, 1, 3] and choose(["arithmetic"], 4)[0].level == 4
    whole = list(islice(mixed_problems(chosen, "train", 7, 0.1), 1000))
    assert whole[600:] == list(islice(mixed_problems(chosen, "train", 7, 0.1, start=600), 400))
    counts = {name: sum(domain == name for domain, _ in whole) for name in NAMES}
    assert all(125 < count < 210 for count in counts.values()), counts
    assert whole != list(islice(mixed_problems(chosen, "train", 8, 0.1), 1000))


def test_prompts_of_tasks_carry_the_domain_and_keep_to_the_split() -> None:
    train = list(islice(prompts(None, "train", 0, tasks=ALL), 600))
    held = list(islice(prompts(None, "heldout", 0, tasks=ALL), 300))
    assert {prompt.domain for prompt in train} == set(NAMES) == {prompt.domain for prompt in held}
    assert len({prompt.key for prompt in held}) == 300 and not {p.key for p in train} & {p.key for p in held}
    assert list(islice(prompts(None, "train", 0, tasks=ALL, start=100), 20)) == train[100:120]
    assert list(islice(prompts(None, "heldout", 0, tasks=ALL, start=100), 20)) == held[100:120]
    for prompt in train + held:
        assert TASKS[prompt.domain].grade(prompt.answer, prompt.answer, prompt.prompt) == 1.0


def test_held_out_problems_end_where_there_are_no_more() -> None:
    keys = [problem.key for _, problem in heldout_problems(choose(["countdown:1"], 2), 0, 0.1)]
    assert 30 < len(keys) == len(set(keys)) < 200
    assert len(list(heldout_problems(choose(["sorting:8"], 2), 0, 0.1, limit=50))) == 50


def test_text_is_mixed_from_tasks_with_and_without_their_working() -> None:
    config = DataConfig(source="synthetic", tasks=ALL, worked_share=0.5)
    found = list(islice(documents(config, "train", seed=2), 300))
    held = {prompt.key for prompt in islice(prompts(None, "heldout", 2, tasks=ALL), 500)}
    assert not held & {document.key for document in found}
    worked = [bool(document.messages and document.messages[1]["reasoning_content"]) for document in found]
    assert 100 < sum(worked) < 200
    later = list(islice(documents(config, "train", seed=2, start=100), 50))
    assert [document.messages for document in later] == [document.messages for document in found[100:150]]
    corpus = tokenizer_corpus(config)
    assert len(corpus) == TOKENIZER_PROBLEMS and any(text.startswith("sort ") for text in corpus)


def test_an_impossible_split_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.tasks.task.MAX_DRAWS", 50)
    with pytest.raises(UserError, match="data.heldout=1e-15 leaves no words:3 in the heldout split"):
        TASKS["words"].problem_at(0, "heldout", 0, 3, 1e-15)
