"""What is said of the data before training, against counts made by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from conf.schema import DataConfig, MixConfig
from data.stream import TokenStream
from data.summary import one_line, summarise, table


@pytest.fixture
def cfg(tmp_path: Path) -> DataConfig:
    lengths = [2, 6, 6, 14, 14, 14, 30, 62, 126]  # two more tokens each: bos and eos
    rows = [json.dumps({"text": chr(97 + place) * length}) for place, length in enumerate(lengths)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, "no JSON", '{"text": ""}']))
    return DataConfig(source="files", path=str(tmp_path / "rows.jsonl"), seq_len=64, heldout=1e-12)


def test_the_numbers_are_those_of_the_documents(cfg: DataConfig, byte_tokenizer) -> None:
    summary = summarise(TokenStream(replace(cfg, packing="best_fit"), byte_tokenizer, 0))
    (source,) = summary["sources"]
    total = 4 + 2 * 8 + 3 * 16 + 32 + 64 + 128
    assert (source["documents"], source["tokens"], source["share"]) == (9, total, 1.0)
    assert source["lengths"] == {"shortest": 4, "p50": 16, "p90": 76, "p99": 122, "longest": 128}
    assert [(one["from"], one["documents"], one["tokens"]) for one in source["histogram"]] == [
        (4, 1, 4), (8, 2, 16), (16, 3, 48), (32, 1, 32), (64, 1, 64), (128, 1, 128),
    ]  # fmt: skip
    assert source["longer_than_a_sequence"] == pytest.approx(1 / 9)
    assert source["epoch"] == {"sequences": 5, "padding": pytest.approx(1 - total / (5 * 64)), "cut": 0.0}
    left = source["left_out"]
    assert left["malformed"] == {"count": 1, "first": [f"{cfg.path}:10"]} and left["empty"]["count"] == 1
    json.dumps(summary)


def test_of_a_source_that_is_read_by_length_only_what_is_read_is_counted(cfg: DataConfig, byte_tokenizer) -> None:
    mix = {"short": MixConfig(path=cfg.path, max_tokens=31), "long": MixConfig(path=cfg.path, min_tokens=32)}
    mixed = replace(cfg, source="mix", path=None, mix=mix)
    short, long = summarise(TokenStream(mixed, byte_tokenizer, 0))["sources"]
    assert (short["documents"], short["tokens"], short["lengths"]["longest"]) == (6, 4 + 2 * 8 + 3 * 16, 16)
    assert (long["documents"], long["tokens"], long["lengths"]["shortest"]) == (3, 32 + 64 + 128, 32)
    assert short["longer_than_a_sequence"] == 0 and [one["from"] for one in long["histogram"]] == [32, 64, 128]


def test_concat_cuts_and_pads_nothing(cfg: DataConfig, byte_tokenizer) -> None:
    stream = TokenStream(cfg, byte_tokenizer, 0)
    (source,) = summarise(stream)["sources"]
    spans = [span for number in range(5) for span in stream.texts[0].layout.spans(number)][:30]
    assert source["epoch"]["padding"] == 0 and 0 < source["epoch"]["cut"] <= 4 / 8
    pieces = {d: sum(span.document == d for span in spans) for d in range(8)}
    assert source["epoch"]["sequences"] == source["tokens"] / 64 and pieces


def test_one_line_and_the_table_say_it(cfg: DataConfig, byte_tokenizer) -> None:
    part = MixConfig(path=cfg.path)
    mixed = replace(
        cfg, source="mix", path=None, mix={"one": replace(part, weight=3), "two": part}, synthetic_share=0.2
    )
    summary = summarise(TokenStream(mixed, byte_tokenizer, 0))
    line = one_line(summary)
    assert "\n" not in line and line.startswith(
        "data (concat): one (60% of tokens): 9 documents, 292 tokens, 5 sequences"
    )
    assert "left out: 1 empty, 1 malformed" in line and line.endswith("20% worked problems")
    text = table(summary, sequences=100)
    assert "share of sequences      20.0%" in text and f"malformed: {cfg.path}:10" in text
    assert "passes of one replica   13.2" in text, "60 of 100 sequences over 292 / 64"
    assert one_line(summarise(TokenStream(DataConfig(source="synthetic"), byte_tokenizer, 0))) == (
        "data (concat): 100% worked problems"
    )
