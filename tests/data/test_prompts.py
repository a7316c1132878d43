"""RL prompts: rows and generated additions, the split they share with the text, position, malformed rows."""

from __future__ import annotations

import json
import logging
from itertools import islice
from pathlib import Path

import pytest

from conf.errors import UserError
from conf.schema import DataConfig
from data.prompts import Prompt, prompts, train_domains
from data.sources import documents, question_key
from data.split import is_heldout


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", [{"prompt": f"question {n}", "answer": n, "extra": [1]} for n in range(40)])


def test_held_out_additions_are_distinct_and_never_in_training_text_or_prompts() -> None:
    held = list(prompts(None, "heldout", seed=4))
    keys = {prompt.key for prompt in held}
    assert len(keys) == len(held) >= 256
    trained = {prompt.key for prompt in islice(prompts(None, "train", seed=4), 5000)}
    shown = {document.key for document in islice(documents(DataConfig(source="synthetic"), "train", 4), 5000)}
    assert len(trained) > 2000 and not keys & trained and not keys & shown
    for prompt in held:
        assert int(prompt.answer) == sum(map(int, prompt.key.split("+"))) and prompt.domain == "arithmetic"
        assert question_key(prompt.prompt) == prompt.key


def test_another_seed_reorders_the_same_held_out_pairs() -> None:
    one, two = list(prompts(None, "heldout", 0)), list(prompts(None, "heldout", 1))
    assert {p.key for p in one} == {p.key for p in two} and [p.key for p in one] != [p.key for p in two]


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("generated", [True, False])
def test_any_position_is_reached_at_once(rows_file: Path, split: str, generated: bool) -> None:
    path = None if generated else rows_file
    whole = list(islice(prompts(path, split, 1, heldout=0.3), 100))
    for start in (0, 1, 5, 60):
        assert list(islice(prompts(path, split, 1, heldout=0.3, start=start), 100 - start)) == whole[start:]


def test_the_domains_of_training(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {n}", "answer": n} | ({"domain": "code"} if n % 2 else {}) for n in range(20)]
    assert train_domains(write(tmp_path / "rows.jsonl", rows)) == {"general", "code"}
    assert train_domains(None) == {"arithmetic"}
    named = train_domains(None, tasks=("words:3", "countdown"))
    assert named == {prompt.domain for prompt in islice(prompts(None, "train", 0, tasks=("words:3", "countdown")), 30)}


def test_rows_are_split_by_their_question_and_shuffled_every_epoch(rows_file: Path) -> None:
    held = list(prompts(rows_file, "heldout", 0, heldout=0.3))
    train_count = 40 - len(held)
    stream = list(islice(prompts(rows_file, "train", 0, heldout=0.3), 2 * train_count))
    first, second = stream[:train_count], stream[train_count:]
    assert 0 < len(held) < 40 and set(first) == set(second) and first != second
    assert {p.prompt for p in first} | {p.prompt for p in held} == {f"question {n}" for n in range(40)}
    assert all(is_heldout(p.key, 0.3) for p in held) and not any(is_heldout(p.key, 0.3) for p in first)
    assert Prompt("question 3", "3", "general", question_key("question 3")) in set(first) | set(held)


def test_a_users_own_additions_keep_to_the_same_split(tmp_path: Path) -> None:
    held = {prompt.key for prompt in prompts(None, "heldout", 0)}
    rows = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(30) for b in range(30)]
    path = write(tmp_path / "sums.jsonl", rows)
    assert not held & {prompt.key for prompt in islice(prompts(path, "train", 0), 900)}
    mine = {prompt.key for prompt in prompts(path, "heldout", 0)}
    assert mine & held and {key for key in mine if min(map(int, key.split("+"))) >= 10} <= held


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p"}, 'no "answer"'),
        ({"answer": "a"}, 'no "prompt"'),
        ({"prompt": " ", "answer": "a"}, '"prompt" is no string with text'),
        ({"prompt": ["p"], "answer": "a"}, '"prompt" is no string with text'),
        ({"prompt": "p", "answer": True}, '"answer" is neither'),
        ({"prompt": "p", "answer": ""}, '"answer" is neither'),
        ({"prompt": "p", "answer": "a", "domain": 3}, '"domain" is not a string'),
        ({"prompt": "p", "answer": "a", "rubric": ["r"]}, '"rubric" is no string with text'),
        ({"prompt": "p", "answer": "a", "rubric": " "}, '"rubric" is no string with text'),
        ({"prompt": "\ud800", "answer": "a"}, "surrogates"),
        ("p", "a str, not an object"),
    ],
)
def test_malformed_rows_are_named_and_skipped(
    row: object, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p", "answer": "a", "domain": "code"}, row])
    with caplog.at_level(logging.WARNING, "winnow.data"):
        found = next(prompts(path, "train", 0, heldout=1e-9, max_bad_rows=1))
    assert (found.prompt, found.answer, found.domain) == ("p", "a", "code")
    assert f"{path}:2: row skipped: " in caplog.text and reason in caplog.text
    with pytest.raises(UserError, match="more than data.max_bad_rows=0"):
        next(prompts(path, "train", 0, heldout=1e-9, max_bad_rows=0))


def test_an_empty_split_and_a_missing_file_say_what_to_give(rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leaves no prompt in the heldout split"):
        next(prompts(rows_file, "heldout", 0, heldout=1e-12))
    with pytest.raises(UserError, match="rl.path=.*none.jsonl matches no file"):
        next(prompts(tmp_path / "none.jsonl", "train", 0))
    (tmp_path / "notes.txt").write_text("text is no prompt")
    with pytest.raises(UserError, match=r"unknown suffix '\.txt': use \.jsonl"):
        next(prompts(tmp_path / "notes.txt", "train", 0))


def test_the_reward_says_what_a_row_must_have(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A judge needs a rubric and no answer, a proof neither; what a row has beyond that is kept."""
    rows = [{"prompt": "p", "rubric": "r"}, {"prompt": "q", "answer": 3, "rubric": "r"}, {"prompt": "s"}]
    path = write(tmp_path / "rows.jsonl", rows)
    for needs, bad, found in (
        (("rubric",), 1, {("p", "", "r"), ("q", "3", "r")}),
        ((), 0, {("p", "", "r"), ("q", "3", "r"), ("s", "", "")}),
        (("answer",), 2, {("q", "3", "r")}),
    ):
        given = islice(
            prompts(path, "train", 0, heldout=1e-9, max_bad_rows=bad, needs=lambda domain, n=needs: n), len(found)
        )
        assert {(p.prompt, p.answer, p.rubric) for p in given} == found
    assert 'row skipped: no "rubric"' in caplog.text


def test_a_datasets_set_of_prompts(tmp_path: Path) -> None:
    import datasets

    rows = [{"prompt": f"question {n}", "answer": n, "extra": [1]} for n in range(40)]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "set"))
    jsonl = write(tmp_path / "rows.jsonl", list(rows))
    for split in ("train", "heldout"):
        found, same = (list(islice(prompts(p, split, 0, heldout=0.3), 60)) for p in (f"hf:{tmp_path / 'set'}", jsonl))
        assert found == same and found
    datasets.Dataset.from_list([{"question": "q", "answer": "a"}]).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(UserError, match="has no column prompt: it has question, answer; rename them"):
        next(prompts(f"hf:{tmp_path / 'other'}", "train", 0))
    with pytest.raises(UserError, match="data.split=test is not in rl.path=hf:.*: it has train"):
        next(prompts(f"hf:{tmp_path / 'set'}", "train", 0, hf_split="test"))
    with pytest.raises(UserError, match="rl.path=hf:.*/none cannot be loaded by datasets"):
        next(prompts(f"hf:{tmp_path / 'none'}", "train", 0))
