"""Mixes by weight and length, long documents more often, a set streamed once: still a pure function of the index."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import UserError
from conf.load import load
from conf.schema import DataConfig, LongDocumentsConfig, MixConfig
from conf.validate import violations
from data import sources
from data.packing import IGNORE
from data.sources import fingerprint, tokenizer_corpus
from data.stream import TEXTS, TokenStream, turns


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows of three letters: short a, short b, and c of 60 or 300 characters."""
    for letter in "abc":
        lengths = [300 + n if letter == "c" and n % 3 == 0 else 20 + n for n in range(40)]
        rows = [json.dumps({"text": letter * length}) for length in lengths]
        (tmp_path / f"{letter}.jsonl").write_text("\n".join(rows))
    return tmp_path


def mixed(folder: Path, **parts: MixConfig) -> DataConfig:
    return DataConfig(source="mix", mix=dict(parts), seq_len=64, heldout=0.1)


def part(folder: Path, letter: str, **settings: object) -> MixConfig:
    return replace(MixConfig(path=str(folder / f"{letter}.jsonl")), **settings)


def tokens_by_letter(stream: TokenStream, count: int) -> Counter[str]:
    found = Counter(int(x) for i in range(count) for x in stream.sequence(i).input_ids)
    return Counter({letter: found[ord(letter)] for letter in "abc"})


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5), first=st.floats(0, 0.9))
def test_turns_give_every_source_all_its_numbers_in_order_and_its_share(weights: list[float], first: float) -> None:
    shares = [first] + [weight / sum(weights[place:]) for place, weight in enumerate(weights)]
    given_ = [turns(index, shares) for index in range(600)]
    wanted = [first] + [(1 - first) * weight / sum(weights) for weight in weights]
    for source, share in enumerate(wanted):
        numbers = [number for one, number in given_ if one == source]
        assert numbers == list(range(len(numbers))), "none twice, none left out"
        assert abs(len(numbers) - 600 * share) <= len(wanted)


def test_weights_are_shares_of_tokens_whatever_the_sizes(folder: Path, byte_tokenizer) -> None:
    cfg = mixed(folder, one=part(folder, "a", weight=3), two=part(folder, "c", weight=1))
    for packing in ("concat", "best_fit"):
        stream = TokenStream(replace(cfg, packing=packing), byte_tokenizer, 0)
        found = tokens_by_letter(stream, 400)
        assert found["a"] / (found["a"] + found["c"]) == pytest.approx(0.75, abs=0.03), packing


def test_a_path_taken_twice_has_a_weight_for_each_range_of_lengths(folder: Path, byte_tokenizer) -> None:
    long, short = part(folder, "c", min_tokens=200, weight=4), part(folder, "c", max_tokens=199)
    stream = TokenStream(mixed(folder, long=long, short=short), byte_tokenizer, 0)
    alone = [TokenStream(mixed(folder, only=one), byte_tokenizer, 0) for one in (long, short)]
    counts = Counter()
    for index in range(50):
        source, number = turns(index, stream.shares)
        counts[source] += 1
        assert torch.equal(stream.sequence(index).input_ids, alone[source - TEXTS].sequence(number).input_ids)
    assert counts == {TEXTS: 40, TEXTS + 1: 10}
    with pytest.raises(UserError, match="data.mix.far leaves none of .* documents, which have 2. to 3.. tokens"):
        TokenStream(mixed(folder, far=part(folder, "c", min_tokens=999)), byte_tokenizer, 0)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_long_documents_occur_more_often_in_training_alone(folder: Path, byte_tokenizer, packing: str) -> None:
    cfg = DataConfig(source="files", path=str(folder / "c.jsonl"), seq_len=512, heldout=0.5, packing=packing)
    often = replace(cfg, long_documents=LongDocumentsConfig(tokens=200, times=3))

    for split, times in (("train", 3), ("heldout", 1)):
        plain, more = (TokenStream(one, byte_tokenizer, 0, split).texts[0] for one in (cfg, often))
        lengths = np.diff(plain.corpus.offsets)
        seen: Counter[int] = Counter()
        for number in range(int(20 * more.layout.figures().sequences)):
            seen.update(span.document for span in more.layout.spans(number) if span.start == 0)
        long, short = (sum(seen[int(n)] for n in np.flatnonzero(which)) for which in (lengths >= 200, lengths < 200))
        each = long / (lengths >= 200).sum(), short / (lengths < 200).sum()
        assert each[0] / each[1] == pytest.approx(times, rel=0.05), split


def test_a_mix_with_problems_resumes_anywhere_on_any_layout(folder: Path, byte_tokenizer, tmp_path: Path) -> None:
    cfg = mixed(folder, one=part(folder, "a", weight=2), two=part(folder, "b"))
    cfg = replace(cfg, synthetic_share=0.2, packing="best_fit", seq_len=128)
    whole = TokenStream(cfg, byte_tokenizer, 5, cache_dir=tmp_path / "cache")
    expected = [whole.sequence(index) for index in range(48)]
    state = whole.state()
    for world, at in ((1, 4), (2, 8), (4, 12)):
        ranks = [TokenStream(cfg, byte_tokenizer, 5, cache_dir=tmp_path / "cache") for _ in range(world)]
        for stream in ranks:
            stream.load_state({**state, "next_sequence": at})
        taken = [
            batch for _ in range(3) for rank in range(world) for batch in ranks[rank].take(4 // world, rank, world)
        ]
        for batch, want in zip(taken, expected[at : at + 12], strict=True):
            assert all(torch.equal(x, batch.tensors()[name]) for name, x in want.tensors().items())
    other = TokenStream(mixed(folder, one=part(folder, "a"), two=part(folder, "c")), byte_tokenizer, 5)
    with pytest.raises(UserError, match="changed since the checkpoint"):
        other.load_state(state)


def test_conversations_are_packed_whole_under_best_fit(tmp_path: Path, byte_tokenizer) -> None:
    path = tmp_path / "chats.jsonl"
    rows = [
        [{"role": "user", "content": "q" * (n % 9)}, {"role": "assistant", "content": "a" * (1 + n % 7)}]
        for n in range(60)
    ]
    path.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    cfg = DataConfig(source="files", path=str(path), seq_len=48, heldout=1e-9, packing="best_fit")
    stream = TokenStream(cfg, byte_tokenizer, 0, conversations=True)
    layout = stream.texts[0].layout
    goals: Counter[int] = Counter()
    for index in range(round(layout.figures().sequences)):
        batch = stream.sequence(index)
        starts = sorted(set(batch.doc_start.tolist()) - {48})
        assert all(int(batch.input_ids[start]) == byte_tokenizer.bos_token_id for start in starts), "none is cut"
        goals.update(int(x) for x in batch.labels if x != IGNORE)
    assert goals[byte_tokenizer.eos_token_id] == 60 and goals[ord("a")] == sum(1 + n % 7 for n in range(60))
    assert goals[ord("q")] == 0


def test_a_trained_tokenizer_learns_from_every_part(folder: Path) -> None:
    cfg = mixed(folder, one=part(folder, "a"), two=part(folder, "b"))
    texts = tokenizer_corpus(cfg)
    assert {text[0] for text in texts} == {"a", "b"}


def test_a_streamed_set_is_read_once_into_the_cache(tmp_path: Path, byte_tokenizer, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "set").mkdir()
    rows = "\n".join(json.dumps({"body": f"text {n}", "n": n}) for n in range(40))
    (tmp_path / "set" / "train.jsonl").write_text(rows)
    cfg = DataConfig(
        source="hf",
        path=str(tmp_path / "set"),
        text_key="body",
        streaming=True,
        heldout=0.2,
        seq_len=32,
        max_documents=30,
    )
    opened = []
    load_hf = sources.load_hf
    monkeypatch.setattr(sources, "load_hf", lambda cfg: opened.append(1) or load_hf(cfg))
    first = TokenStream(cfg, byte_tokenizer, 0, cache_dir=tmp_path / "cache")
    assert opened == [1] and not list((tmp_path / "hf").glob("**/*.arrow")), "nothing but the tokens is kept"
    assert first.corpus is not None and 15 < first.corpus.num_documents < 30
    again = TokenStream(cfg, byte_tokenizer, 0, cache_dir=tmp_path / "cache")
    assert opened == [1] and torch.equal(first.sequence(3).input_ids, again.sequence(3).input_ids)
    before = fingerprint(cfg)
    (tmp_path / "set" / "train.jsonl").write_text(rows.replace("text 7", "text seven"))
    assert fingerprint(cfg) != before
    with pytest.raises(UserError, match="data.split=test is not in .* it has train"):
        TokenStream(replace(cfg, split="test"), byte_tokenizer, 0)
    with pytest.raises(UserError, match="no column text or messages: give data.text_key, one of body, n"):
        TokenStream(replace(cfg, text_key="text"), byte_tokenizer, 0)


BASE = ["+stage=pretrain", "data.source=mix"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (BASE, "data.source=mix has nothing to read: give data.mix.NAME.path"),
        ([*BASE, "data.path=x", "data.mix.a.path=a"], "data.path=x is not read by data.source=mix"),
        (["+stage=pretrain", "data.mix.a.path=a"], "data.mix is not read by data.source=stdlib: add data.source=mix"),
        ([*BASE, "data.mix.a.weight=2"], "data.mix.a has nothing to read: give data.mix.a.path=PATH"),
        ([*BASE, "data.mix.a.path=a", "data.mix.a.weight=0"], "data.mix.a.weight=0 is outside (0, inf)"),
        ([*BASE, "data.mix.a.source=synthetic"], "data.mix.a.source=synthetic cannot be mixed"),
        ([*BASE, "data.mix.a.source=stdlib", "data.mix.a.path=a"], "data.mix.a.path=a is not read by"),
        ([*BASE, "data.mix.a.path=a", "data.mix.a.min_tokens=0"], "data.mix.a.min_tokens=0 is too small"),
        (
            [*BASE, "data.mix.a.path=a", "data.mix.a.min_tokens=5", "data.mix.a.max_tokens=4"],
            "data.mix.a.max_tokens=4 is below data.mix.a.min_tokens=5",
        ),
        (["+stage=sft", "data.source=mix", "data.mix.a.source=stdlib"], "data.mix.a.source=stdlib holds no conv"),
        (["+stage=pretrain", "data.streaming=true"], "data.streaming=true is not read by data.source=stdlib"),
        (["+stage=pretrain", "data.decontaminate=[' ']"], "data.decontaminate names an empty path"),
        (["+stage=pretrain", "data.packing=best"], "data.packing=best is not known: "),
        (["+stage=pretrain", "data.dedup=1"], "data.dedup=1 is outside (0, 0.99]"),
        (["+stage=pretrain", "data.long_documents.times=0"], "data.long_documents.times=0 is too small"),
    ],
)
def test_mistakes_in_what_is_read_end_in_one_line(argv: list[str], message: str) -> None:
    (found,) = violations(load(argv).config)
    assert found.startswith(message)
