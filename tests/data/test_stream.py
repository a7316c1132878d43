"""The stream: every document once an epoch, one content for every layout, exact resume, the cache, the mix."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.errors import UserError
from conf.schema import DataConfig
from data import corpus
from data.packing import IGNORE, PackedBatch, pack
from data.split import is_heldout
from data.stream import TokenStream
from data.tasks.arithmetic import prompt_key
from data.tokenizer import encode_texts, load_tokenizer

TEXTS = [f"{n}:" + "abcdefghij"[: n % 11] * (1 + n % 4) for n in range(30)]


@pytest.fixture
def cfg(tmp_path: Path) -> DataConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return DataConfig(source="files", path=str(path), seq_len=32, heldout=0.2)


def same(a: PackedBatch, b: PackedBatch) -> bool:
    return all(torch.equal(x, b.tensors()[name]) for name, x in a.tensors().items())


def token_counts(batches: list[PackedBatch]) -> Counter[int]:
    return Counter(int(x) for batch in batches for x in batch.input_ids[batch.doc_start < len(batch.doc_start)])


def test_an_epoch_is_every_document_once_packed_in_an_order_of_its_own(cfg: DataConfig, byte_tokenizer) -> None:
    stream = TokenStream(cfg, byte_tokenizer, seed=3)
    assert stream.corpus is not None
    total, frame = stream.corpus.num_tokens, (byte_tokenizer.bos_token_id, byte_tokenizer.eos_token_id)
    laid = torch.cat([stream.sequence(i).input_ids for i in range(-(-2 * total // cfg.seq_len))])
    epochs = [laid[:total].tolist(), laid[total : 2 * total].tolist()]
    read = []
    for epoch in epochs:
        ends = [i + 1 for i, token in enumerate(epoch) if token == frame[1]]
        read.append([epoch[a:b] for a, b in zip([0, *ends], ends, strict=False)])
    train = [
        text
        for text, ids in zip(TEXTS, encode_texts(byte_tokenizer, TEXTS), strict=True)
        if [frame[0], *ids, frame[1]] in read[0]
    ]
    assert sorted(read[0]) == sorted(read[1]) and len(train) == len(read[0]) == stream.corpus.num_documents
    assert read[0] != read[1], "each epoch has its own order"
    packed = pack(read[0] + read[1], cfg.seq_len)
    assert all(same(stream.sequence(i), packed[i]) for i in range(len(packed) - 1)), "borders as pack makes them"


def test_train_and_heldout_share_nothing(cfg: DataConfig, byte_tokenizer) -> None:
    texts = {}
    for split in ("train", "heldout"):
        stream = TokenStream(cfg, byte_tokenizer, 0, split)
        assert stream.corpus is not None
        whole = byte_tokenizer.decode(np.asarray(stream.corpus.tokens))
        texts[split] = {
            text for text in TEXTS if f"{byte_tokenizer.bos_token}{text}{byte_tokenizer.eos_token}" in whole
        }
    assert texts["train"] | texts["heldout"] == set(TEXTS) and not texts["train"] & texts["heldout"]


def test_sequences_are_pure_functions_of_seed_and_index(cfg: DataConfig, byte_tokenizer) -> None:
    mixed = replace(cfg, synthetic_share=0.4, seq_len=64)
    one, two = TokenStream(mixed, byte_tokenizer, 7), TokenStream(mixed, byte_tokenizer, 7)
    in_order = [one.sequence(i) for i in range(40)]
    assert all(same(two.sequence(i), in_order[i]) for i in (39, 0, 17, 38, 1))
    assert not same(TokenStream(mixed, byte_tokenizer, 8).sequence(0), in_order[0])


def test_a_step_holds_the_same_sequences_under_any_layout(cfg: DataConfig, byte_tokenizer) -> None:
    streams = [TokenStream(cfg, byte_tokenizer, 1) for _ in range(7)]
    alone = [streams[0].take(4) for _ in range(3)]
    two = [[s.take(2, rank, 2) for rank, s in enumerate(streams[1:3])] for _ in range(3)]
    four = [[s.take(1, rank, 4) for rank, s in enumerate(streams[3:])] for _ in range(3)]
    for step in range(3):
        for layout in (two, four):
            flat = [batch for rank in layout[step] for batch in rank]
            assert all(same(a, b) for a, b in zip(alone[step], flat, strict=True))
    assert {stream.position for stream in streams} == {12}


def test_resume_goes_on_where_the_state_was_taken(cfg: DataConfig, byte_tokenizer) -> None:
    stream = TokenStream(replace(cfg, synthetic_share=0.3, seq_len=64), byte_tokenizer, 1)
    stream.take(3)
    state = json.loads(json.dumps(stream.state()))
    after = stream.take(5)
    again = TokenStream(stream.cfg, byte_tokenizer, 1)
    again.load_state(state)
    assert all(same(a, b) for a, b in zip(after, again.take(5), strict=True)) and again.state() == stream.state()


def test_resume_on_other_data_is_refused(cfg: DataConfig, byte_tokenizer, trained_tokenizer) -> None:
    state = TokenStream(cfg, byte_tokenizer, 1).state()
    for other in (
        TokenStream(cfg, trained_tokenizer, 1),
        TokenStream(replace(cfg, source="synthetic"), byte_tokenizer, 1),
    ):
        with pytest.raises(UserError, match="changed since the checkpoint"):
            other.load_state(state)


@pytest.mark.parametrize("share", [0.25, 0.4])
def test_the_mix_is_of_whole_sequences_spread_evenly(cfg: DataConfig, byte_tokenizer, share: float) -> None:
    stream = TokenStream(replace(cfg, synthetic_share=share, seq_len=64), byte_tokenizer, 0)
    user = byte_tokenizer.convert_tokens_to_ids("<｜User｜>")
    arithmetic = [bool((stream.sequence(i).input_ids == user).any()) for i in range(200)]
    assert sum(arithmetic) == pytest.approx(200 * share, abs=1)
    for start in range(0, 180):
        assert abs(sum(arithmetic[start : start + 20]) - 20 * share) <= 1
    text_alone = TokenStream(replace(cfg, seq_len=64), byte_tokenizer, 0)
    texts = [i for i in range(20) if not arithmetic[i]]
    assert all(same(stream.sequence(i), text_alone.sequence(n)) for n, i in enumerate(texts)), "no text is lost"


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_arithmetic_sequences_hold_whole_problems_of_their_split(byte_tokenizer, split: str) -> None:
    cfg = DataConfig(source="synthetic", seq_len=128)
    stream = TokenStream(cfg, byte_tokenizer, 2, split)
    seen: list[str] = []
    for index in range(30):
        batch = stream.sequence(index)
        starts = sorted(set(batch.doc_start.tolist()) - {128})
        ends = [*starts[1:], int((batch.doc_start < 128).sum())]
        assert 128 - ends[-1] < 48, "as many problems as fit"
        for start, end in zip(starts, ends, strict=True):
            text = byte_tokenizer.decode(batch.input_ids[start:end])
            prompt, answer = text.split("<｜User｜>")[1].split("<｜Assistant｜>")
            working, result = answer.removeprefix("<think>").removesuffix(byte_tokenizer.eos_token).split("</think>")
            key = prompt_key(prompt)
            assert key is not None and is_heldout(key, cfg.heldout) == (split == "heldout")
            assert sum(map(int, key.split("+"))) == int(result) and working
            labels = [int(x) for x in batch.labels[start:end] if x != IGNORE]
            assert byte_tokenizer.decode(labels) == f"{working}</think>{result}{byte_tokenizer.eos_token}"
            seen.append(prompt)
    assert len(set(seen)) > 0.6 * len(seen), "sequences show different problems"


def test_a_sequence_too_short_for_a_problem_is_refused(byte_tokenizer) -> None:
    with pytest.raises(UserError, match="data.seq_len=16 holds no worked problem of .* tokens"):
        TokenStream(DataConfig(source="synthetic", seq_len=16), byte_tokenizer, 0).sequence(0)


def test_conversations_learn_on_assistant_tokens_alone_also_across_cuts(tmp_path: Path, byte_tokenizer) -> None:
    path = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": "q" * (n % 9)}, {"role": "assistant", "content": "a" * (1 + n % 7)}]}
        for n in range(40)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    cfg = DataConfig(source="files", path=str(path), seq_len=16, heldout=1e-9)
    stream = TokenStream(cfg, byte_tokenizer, 0, conversations=True)
    assert stream.corpus is not None
    count = stream.corpus.num_tokens // 16
    for name in ("labels", "mtp_labels"):
        goals = Counter(int(x) for i in range(count) for x in stream.sequence(i).tensors()[name] if x != IGNORE)
        assert set(goals) == {ord("a"), byte_tokenizer.eos_token_id}
    shown = token_counts([stream.sequence(i) for i in range(count)])
    assert shown[ord("q")] > 0 and min(shown) >= 0


def test_the_cache_is_used_by_the_next_stage_and_by_nobody_else(
    cfg: DataConfig, byte_tokenizer, trained_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = TokenStream(cfg, byte_tokenizer, 0, cache_dir=cache)
    assert same(first.sequence(1), TokenStream(cfg, byte_tokenizer, 0).sequence(1)), "cached or not, the same"
    TokenStream(cfg, trained_tokenizer, 0, cache_dir=cache)
    TokenStream(cfg, load_tokenizer("train:264", corpus=["abcd"]), 0, cache_dir=cache)  # the same frame, another text
    TokenStream(cfg, byte_tokenizer, 0, "heldout", cache_dir=cache)
    TokenStream(replace(cfg, heldout=0.4), byte_tokenizer, 0, cache_dir=cache)
    assert len(list(cache.iterdir())) == 5 and not list(cache.glob(".building-*"))

    def no_reading(*arguments: object, **options: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(corpus, "documents", no_reading)
    again = TokenStream(replace(cfg, seq_len=16), byte_tokenizer, 5, cache_dir=cache)  # neither is part of the key
    assert again.state()["corpus"] == first.state()["corpus"]
    with pytest.raises(AssertionError, match="tokenised again"):
        Path(str(cfg.path)).write_text('{"text": "changed"}')
        TokenStream(cfg, byte_tokenizer, 0, cache_dir=cache)


def test_a_failed_build_leaves_no_entry_and_a_cut_one_is_named(cfg: DataConfig, byte_tokenizer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match="leaves none of the 30 documents"):
        TokenStream(replace(cfg, heldout=1e-9), byte_tokenizer, 0, "heldout", cache_dir=cache)
    assert list(cache.iterdir()) == []
    TokenStream(cfg, byte_tokenizer, 0, cache_dir=cache)
    (entry,) = cache.iterdir()
    tokens = entry / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-8])
    with pytest.raises(UserError, match=f"delete {entry} and start again"):
        TokenStream(cfg, byte_tokenizer, 0, cache_dir=cache)


def test_progress_speaks_only_when_asked(cfg: DataConfig, byte_tokenizer, capsys: pytest.CaptureFixture) -> None:
    TokenStream(cfg, byte_tokenizer, 0)
    assert capsys.readouterr().err == ""
    stream = TokenStream(cfg, byte_tokenizer, 0, progress=True)
    assert stream.corpus is not None
    line = f"tokenising files (train): {stream.corpus.num_tokens:,} tokens of {stream.corpus.num_documents} documents"
    assert capsys.readouterr().err.strip() == line
