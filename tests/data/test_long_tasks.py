"""Long-context tasks: every answer follows from the text (solved here by other code), stands where it shall, fits its
length, and no held-out fact is in training; what the mix makes of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import UserError
from conf.schema import LONG_LEVELS, DataConfig
from data.long_stream import LongProblems
from data.packing import IGNORE
from data.sources import tokenizer_corpus
from data.split import is_heldout
from data.stream import LONG, WORKED, TokenStream, turns
from data.tasks.long import LONG_TASKS, LongProblem, choose_long, copying, problem_at, recall
from data.tasks.long.vocabulary import NAMES, VALUES, filler
from data.tokenizer import encode_texts, load_tokenizer

NAMED = ["needle", "needle:2", "queries", "values", "kv", "kv:2", "variables", "common", "hops", "copy", "repeat"]
ANY = st.sampled_from([(name, level) for name, most in LONG_LEVELS.items() for level in range(1, most + 1)])


def words(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]|\n", text))


def codes(text: str, name: str) -> list[str]:
    return re.findall(rf"The code of {name} is (\w+)\.", text)


def solve_needle(text: str, question: str) -> str:
    (code,) = codes(text, question.split()[3])
    return f" {code}."


def solve_queries(text: str, question: str) -> str:
    asked = question.removeprefix("\nThe codes of ").removesuffix(" are").split(", ")
    return f" {', '.join(codes(text, name)[0] for name in asked)}."


def solve_values(text: str, question: str) -> str:
    return f" {', '.join(codes(text, question.split()[3]))}."


def solve_kv(text: str, question: str) -> str:
    (code,) = re.findall(rf"(?<=[. ]) ?{question.strip()} (\w+)\.", text)
    return f" {code}."


def solve_variables(text: str, question: str) -> str:
    found = [question.split()[-1].rstrip(":")]
    for name, source in re.findall(r" (\w+) = (\w+)\.", text):
        found += [name] if source in found else []
    return f" {', '.join(found[1:])}."


def solve_common(text: str, question: str) -> str:
    """All that stand clearly out: others have one number of occurrences, give or take the last one's cut."""
    counts = Counter(text.split())
    usual = Counter(counts.values()).most_common(1)[0][0]
    return f" {', '.join(name for name, count in counts.most_common() if count >= 2 * usual)}."


def solve_hops(text: str, question: str) -> str:
    name = question.split()[-2]
    for _ in range(question.count("friend")):
        (name,) = re.findall(rf"The friend of {name} is (\w+)\.", text)
    return solve_needle(text, f"\nThe code of {name} is")


def solve_copy(text: str, question: str) -> str:
    before, cue, after = text.partition(question.removeprefix("\n"))
    assert cue and question.removeprefix("\n") not in after
    return after


SOLVERS: dict[str, Callable[[str, str], str]] = {
    "needle": solve_needle,
    "queries": solve_queries,
    "values": solve_values,
    "kv": solve_kv,
    "variables": solve_variables,
    "common": solve_common,
    "hops": solve_hops,
    "copy": solve_copy,
    "repeat": lambda text, question: text,
}


def test_every_family_has_levels_and_a_solver() -> None:
    assert set(LONG_TASKS) == set(LONG_LEVELS) == set(SOLVERS)
    assert all(1 <= task.level <= LONG_LEVELS[name] for name, task in LONG_TASKS.items())
    assert len({*NAMES, *VALUES}) == len(NAMES) + len(VALUES) > 300


def test_filler_holds_no_name_and_no_value() -> None:
    import random

    rng = random.Random(0)
    said = set(re.findall(r"\w+", " ".join(filler(rng) for _ in range(2000)).lower()))
    assert len(said) > 40 and not said & {*NAMES, *VALUES, "code", "codes"}


@settings(max_examples=120, deadline=None)
@given(
    chosen=ANY,
    index=st.integers(0, 10**9),
    split=st.sampled_from(["train", "heldout"]),
    length=st.integers(400, 3000),
    depth=st.none() | st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    questions=st.integers(1, 12),
)
def test_answers_follow_from_a_text_of_the_asked_length(
    chosen: tuple[str, int], index: int, split: str, length: int, depth: float | None, questions: int
) -> None:
    name = f"{chosen[0]}:{chosen[1]}"

    def make() -> LongProblem:
        return problem_at(name, index, split, 7, length, depth, words, questions=questions)

    problem = make()
    assert problem == make()
    text = "".join(problem.context)
    for question in problem.questions:
        found = SOLVERS[chosen[0]](text, question.prompt)
        assert found.startswith(question.answer) if chosen[0] == "copy" else found == question.answer
    total = words(text) + sum(words(each.prompt) + words(each.answer) for each in problem.questions)
    assert 0.96 * length - 10 <= total <= length
    assert 1 <= len(problem.questions) <= questions
    assert problem.keys and all(is_heldout(key, 0.1) == (split == "heldout") for key in problem.keys)


@pytest.mark.parametrize("name", [name for name in NAMED if choose_long(name)[0].has_depth])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_answer_stands_where_it_was_asked_for(name: str, depth: float) -> None:
    problem = problem_at(name, 3, "heldout", 0, 3000, depth, words)
    (question,) = problem.questions
    text = "".join(problem.context)
    assert question.depth == pytest.approx(depth, abs=0.03)
    first = re.split("[,.]", question.answer)[0]  # of several: it stands in the first fact
    sought = {"copy": question.answer, "kv": question.prompt.strip() + first, "kv:2": question.prompt.strip() + first}
    place = text.index(sought.get(name, first)) / len(text)
    assert place == pytest.approx(depth, abs=0.06)


def test_a_cue_occurs_once_however_few_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "NAMES", NAMES[:9])
    for index in range(40):
        problem = problem_at("copy", index, "train", 0, 60, None, words)
        assert "".join(problem.context).count(problem.questions[0].prompt.strip()) == 1


@pytest.mark.parametrize("name", [name for name in NAMED if name[:4] not in ("vari", "comm", "copy", "repe")])
def test_a_key_names_a_fact_that_stands_there(name: str) -> None:
    for index in range(20):
        problem = problem_at(name, index, "train", 0, 300, None, words, questions=3)
        text = "".join(problem.context)
        told = re.findall(r" The code of (\w+) is (\w+)\.| (\w+(?: \w+)?): (\w+)\.", text)
        assert sorted(problem.keys) == sorted(f"code:{a or c}={b or d}" for a, b, c, d in told)


@pytest.mark.parametrize("name", NAMED)
def test_splits_share_no_key(name: str) -> None:
    keys = {
        split: {key for i in range(150) for key in problem_at(name, i, split, 0, 300, None, words).keys}
        for split in ("train", "heldout")
    }
    assert min(map(len, keys.values())) >= 100 and not keys["train"] & keys["heldout"]


def test_problems_differ_by_every_part_of_their_address() -> None:
    asked = [("needle", 0, 300, 0.5), ("needle", 1, 300, 0.5), ("needle", 0, 301, 0.5), ("needle", 0, 300, 0.25)]
    texts = {problem_at(name, i, "train", 0, length, depth, words).prompt for name, i, length, depth in asked}
    assert len(texts) == len(asked)


def test_what_cannot_fit_is_said() -> None:
    with pytest.raises(UserError, match="20 tokens hold no problem of variables:8: give a greater length"):
        problem_at("variables:8", 0, "train", 0, 20, 0.5, words)
    with pytest.raises(UserError, match="leaves no long-context fact in the heldout split"):
        problem_at("needle", 0, "heldout", 0, 200, 0.5, words, share=0.0)


def test_a_small_split_still_has_problems() -> None:
    """Some names have fewer held-out values than values:8 asks for, and at a hundredth many have none."""
    for name, share in (("values:8", 0.1), ("needle", 0.01), ("kv", 0.01), ("hops", 0.01), ("variables", 0.01)):
        for index in range(12):
            problem = problem_at(name, index, "heldout", 0, 500, None, words, questions=64, share=share)
            assert all(is_heldout(key, share) for key in problem.keys)
            assert len(set(problem.keys)) == len(problem.keys)
    assert sum(is_heldout(f"code:walnut={value}", 0.1) for value in VALUES) < 8


def test_pairs_never_run_out_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "NAMES", NAMES[:6])
    problem = problem_at("kv:2", 0, "train", 0, 600, None, words)
    assert len(problem.keys) == len(set(problem.keys)) > 6 * 6


def test_a_length_that_holds_no_problem_is_said_before_the_first_step(byte_tokenizer) -> None:
    short = DataConfig(source="synthetic", long_tasks=("needle", "queries"), long_share=0.5, seq_len=2000)
    with pytest.raises(UserError, match="data.long_min=128 with the task queries: .* hold no problem of queries:3"):
        TokenStream(short, byte_tokenizer, 0)


def test_words_too_long_for_the_budget_are_drawn_again() -> None:
    for index in range(50):  # of one draw each, more than half would not fit
        problem = problem_at("needle", index, "train", 0, 56, None, len)
        assert len(problem.prompt + problem.answer) <= 56


def test_beside_text_2048_tokens_make_every_word_one() -> None:
    cfg = DataConfig(source="stdlib", long_tasks=("copy:1", "copy:1", "needle", "kv"), long_share=0.3)
    tokenizer = load_tokenizer("train:2048", corpus=tokenizer_corpus(cfg))
    ids = encode_texts(tokenizer, [f" {word}" for word in (*NAMES, *VALUES)])
    assert {len(each) for each in ids} == {1}


CFG = DataConfig(
    source="synthetic", long_tasks=tuple(NAMED), long_share=1.0, seq_len=2000, long_min=400, long_questions=4
)


@pytest.mark.parametrize("name", NAMED)
def test_ids_are_those_of_the_whole_text(trained_tokenizer, name: str) -> None:
    problems = LongProblems(CFG, trained_tokenizer, 0, "train")
    problem = problems.problem(name, 5, 900, questions=3)
    ids, targets = problems.encoded(problem)
    text = "".join([*problem.context, *(each.prompt + each.answer for each in problem.questions)])
    begin, end = trained_tokenizer.bos_token_id, trained_tokenizer.eos_token_id
    assert ids.tolist() == [begin, *encode_texts(trained_tokenizer, [text])[0], end]
    answers = "".join(each.answer for each in problem.questions)
    assert trained_tokenizer.decode(ids[targets][:-1]) == answers and targets[-1]
    assert 0.9 * 900 < len(ids) <= 900
    ids, targets = problems.asked(problem)
    assert trained_tokenizer.decode(ids[1:]) == problem.prompt + problem.answer
    assert trained_tokenizer.decode(ids[targets]) == problem.answer and targets[-1]


def test_a_mixed_in_sequence_is_full_and_asks_for_answers_alone(byte_tokenizer) -> None:
    stream = TokenStream(CFG, byte_tokenizer, 0)
    sizes, padding, asked = [], 0, 0
    for index in range(30):
        batch = stream.sequence(index)
        assert all((batch.tensors()[name] == field).all() for name, field in stream.sequence(index).tensors().items())
        real = batch.doc_start < CFG.seq_len
        starts = batch.doc_start[real].unique().tolist()
        sizes += [end - start for start, end in zip(starts, [*starts[1:], int(real.sum())], strict=True)]
        padding, asked = padding + int((~real).sum()), asked + int((batch.labels != IGNORE).sum())
    assert padding < 0.12 * 30 * CFG.seq_len  # what is left is shorter than long_min
    assert min(sizes) > 330 and max(sizes) > 1500  # byte tokens: a sentence of filler has up to sixty
    assert 0 < asked < 0.4 * 30 * CFG.seq_len
    other = TokenStream(CFG, byte_tokenizer, 0, "heldout")
    assert (other.sequence(0).input_ids != stream.sequence(0).input_ids).any()


def test_shares_are_of_all_tokens(byte_tokenizer, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("only text here, nothing else at all. " * 400)
    (tmp_path / "b.txt").write_text("and some more of the same kind of text. " * 400)
    cfg = DataConfig(
        source="files", path=str(tmp_path), heldout=0.0, seq_len=400, long_tasks=("needle",), long_share=0.3,
        long_min=200, synthetic_share=0.2,
    )  # fmt: skip
    stream = TokenStream(cfg, byte_tokenizer, 0)
    kinds: Counter[str] = Counter()
    for index in range(100):
        text = byte_tokenizer.decode(stream.sequence(index).input_ids)
        kinds["long" if "The code of" in text else "text" if "text" in text else "worked"] += 1
    assert kinds == {"long": 30, "text": 50, "worked": 20}
    full = TokenStream(replace(cfg, long_share=0.7, synthetic_share=0.3), byte_tokenizer, 0)
    assert {turns(index, full.shares)[0] for index in range(1000)} == {LONG, WORKED}  # nothing is left for text
