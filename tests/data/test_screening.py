"""Near-duplicates and decontamination: what they drop, what they keep, and what is said of it."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conf.errors import UserError
from conf.schema import DataConfig
from data import overlap
from data.corpus import Corpus, open_corpus
from data.duplicates import SCHEME, SEED, Seen, signature
from data.overlap import make_runs, read_runs, words
from data.split import digest, is_heldout

VOCABULARY = [f"w{n}" for n in range(4000)]
QUESTION = "A farmer has seventeen sheep and all but nine of them run away so how many are left"


def prose(seed: int, count: int = 200) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY, k=count))


def changed(text: str, every: int) -> str:
    """Each `every`-th word is another."""
    return " ".join("other" if place % every == 0 else word for place, word in enumerate(text.split()))


def write(path: Path, texts: list[str]) -> DataConfig:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return DataConfig(source="files", path=str(path), heldout=0.2)


def kept(corpus: Corpus, tokenizer) -> list[str]:
    edges = zip(corpus.offsets, corpus.offsets[1:], strict=False)
    return [tokenizer.decode(corpus.tokens[a + 1 : b - 1]) for a, b in edges]


def jaccard(a: str, b: str) -> float:
    one, two = ({tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (words(a), words(b)))
    return len(one & two) / len(one | two)


@pytest.mark.parametrize("every", [3, 10, 30, 100, 1000])
def test_signatures_estimate_the_similarity_of_runs_of_words(every: int) -> None:
    text = prose(1, 2000)
    other = changed(text, every)
    estimate = float(np.mean(signature(text) == signature(other)))
    assert estimate == pytest.approx(jaccard(text, other), abs=0.15)
    assert (signature(text) == signature(text.upper().replace(" ", "\n"))).all(), "case and spaces do not count"


def test_short_and_wordless_texts_are_compared_as_wholes() -> None:
    seen = Seen(0.8)
    assert [seen.is_duplicate(signature(text)) for text in ("a b", "a  b", "a c", "+-", "+-", "--")] == [
        False, True, False, False, True, False,
    ]  # fmt: skip


def test_candidates_below_the_threshold_are_kept() -> None:
    for number in range(40):
        seen, (one, two) = Seen(0.5), (signature(text) for text in (prose(number), changed(prose(number), 12)))
        assert not seen.is_duplicate(one)
        expected = np.mean(one == two) >= 0.5 and bool(seen.index.query(_sketch(two)))
        assert seen.is_duplicate(two) == expected


def _sketch(found: np.ndarray):
    from datasketch import LeanMinHash

    return LeanMinHash(seed=SEED, hashvalues=found, scheme=SCHEME)


def test_of_near_duplicates_the_first_stays_in_whichever_split(tmp_path: Path, byte_tokenizer) -> None:
    texts = [prose(n) for n in range(40)]
    near = [changed(text, 67) for text in texts[:20]]
    far = [changed(text, 4) for text in texts[20:30]]
    everything = texts + near + far
    cfg = replace(write(tmp_path / "rows.jsonl", everything), dedup=0.7)
    both = {split: open_corpus(cfg, byte_tokenizer, split) for split in ("train", "heldout")}
    names = [kept(corpus, byte_tokenizer) for corpus in both.values()]
    assert sorted(sum(names, [])) == sorted(texts + far), "no near copy of what the other split holds"
    for split, corpus in both.items():
        mine = [text for text in near if is_heldout(digest(text), 0.2) == (split == "heldout")]
        dropped = corpus.meta["left_out"].get("duplicate", {"count": 0, "first": []})
        assert dropped["count"] == len(mine)
        lines = [f"{cfg.path}:{everything.index(text) + 1}" for text in mine]
        assert dropped["first"] == lines
    assert 0 < both["heldout"].meta["left_out"]["duplicate"]["count"] < 20


def test_words_of_any_script() -> None:
    assert words("It's Ünlike_this — 42!") == ["it", "s", "ünlike_this", "42"]
    assert words("日本語 abc") == ["日", "本", "語", "abc"]


def test_a_shared_run_of_thirteen_words_is_found_wherever_and_however_it_stands() -> None:
    runs = make_runs([QUESTION, "What is the capital of the smallest country there?", "2 + 2 ="])
    assert (runs.num_rows, runs.too_short) == (3, 1)
    assert runs.hits(QUESTION) and runs.hits(f"{prose(1)} {QUESTION.upper()}! {prose(2)}")
    parts = QUESTION.split()
    assert runs.hits(" ".join(["x", *parts[2:15], "x"])) and not runs.hits(" ".join(["x", *parts[2:14], "x"]))
    assert not runs.hits(" ".join(parts[:8] + ["sheep"] + parts[8:12])), "all words known, in another order"
    assert runs.hits("so: what is the capital of the smallest country there") and not runs.hits("2 + 2 = 4")
    assert not runs.hits("") and not runs.hits("what is the capital of")
    assert not make_runs(["too short"]).hits("too short") and not make_runs([]).hits(QUESTION)


def test_contaminated_documents_are_dropped_counted_and_named(tmp_path: Path, byte_tokenizer) -> None:
    texts = [prose(n) for n in range(20)]
    texts[7] += " " + QUESTION
    texts[11] = QUESTION + " " + texts[11]
    cfg = replace(write(tmp_path / "rows.jsonl", texts), heldout=1e-9)
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": QUESTION, "answer": "9"}) + '\n{"question": "1 + 1"}\n')
    clean = open_corpus(replace(cfg, decontaminate=(str(tmp_path / "eval.jsonl"),)), byte_tokenizer, "train")
    assert kept(clean, byte_tokenizer) == [text for n, text in enumerate(texts) if n not in (7, 11)]
    assert clean.meta["left_out"] == {"contaminated": {"count": 2, "first": [f"{cfg.path}:8", f"{cfg.path}:12"]}}
    assert clean.meta["evaluation_rows"] == {"looked_for": 1, "too_short": 1}
    whole = write(tmp_path / "only.jsonl", [QUESTION])
    with pytest.raises(UserError, match="1 contaminated documents leave nothing of .*only.jsonl"):
        only = replace(whole, heldout=1e-9, decontaminate=(str(tmp_path / "eval.jsonl"),))
        open_corpus(only, byte_tokenizer, "train")


def test_evaluation_rows_of_every_form_are_read_and_others_refused(tmp_path: Path, monkeypatch) -> None:
    chat = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": prose(3)}]
    rows = {"a.jsonl": {"messages": chat}, "b.jsonl": {"text": QUESTION}, "c.jsonl": {"problem": QUESTION}}
    for name, row in rows.items():
        (tmp_path / name).write_text(json.dumps(row))
        runs = read_runs([str(tmp_path / name)], 0)
        assert runs.hits(QUESTION) and not runs.hits(prose(3)), name
    (tmp_path / "d.txt").write_text(QUESTION)
    assert read_runs([str(tmp_path)], 0).num_rows == 4
    (tmp_path / "e.jsonl").write_text('{"answer": 5}')
    with pytest.raises(UserError, match="e.jsonl has no row with text, prompt, question"):
        read_runs([str(tmp_path / "e.jsonl")], 5)
    (tmp_path / "f.txt").write_text("word " * (2 << 20) + QUESTION)
    assert read_runs([str(tmp_path / "f.txt")], 0).hits(QUESTION), "the limit of training documents is not its limit"
    (tmp_path / "g.txt").write_text("\0" + QUESTION)
    with pytest.raises(UserError, match="g.txt:1 is binary: cut it up or leave it out"):
        read_runs([str(tmp_path / "g.txt")], 5)
    monkeypatch.setattr(overlap, "MOST_BYTES", 100)
    for name in ("f.txt", "long.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": QUESTION * 3}) + '\n{"text": "short"}')
        with pytest.raises(UserError, match=f"{name}:1 is too long"):
            read_runs([str(tmp_path / name)], 5)
    with pytest.raises(UserError, match="data.decontaminate=.* matches no file"):
        read_runs([str(tmp_path / "none.jsonl")], 5)


def test_screening_is_part_of_the_cache_key(tmp_path: Path, byte_tokenizer) -> None:
    cfg, cache = write(tmp_path / "rows.jsonl", [prose(n) for n in range(20)]), tmp_path / "cache"
    (tmp_path / "eval.txt").write_text(QUESTION)
    against = replace(cfg, decontaminate=(str(tmp_path / "eval.txt"),))
    for one in (cfg, against, replace(cfg, dedup=0.8), replace(cfg, dedup=0.9), replace(cfg, max_tokens=100)):
        open_corpus(one, byte_tokenizer, "train", cache_dir=cache)
    assert len(list(cache.iterdir())) == 5
    (tmp_path / "eval.txt").write_text(QUESTION + " today")
    open_corpus(against, byte_tokenizer, "train", cache_dir=cache)
    assert len(list(cache.iterdir())) == 6, "the evaluation set changed"
    open_corpus(replace(cfg, packing="best_fit", workers=2), byte_tokenizer, "train", cache_dir=cache)
    assert len(list(cache.iterdir())) == 6, "neither changes the tokens"


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UserError, match="data.dedup needs datasketch: pip install"):
        Seen(0.8)
