"""The small form of the 100 MB test: tokenised, packed and resumed on 1, 2 and 4 ranks to one token stream."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import data as bench
from data.stream import TokenStream
from data.tokenizer import load_tokenizer


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def ranks(module: str, folder: str, rank: str, world: str) -> dict[str, str]:
        return json.loads(json.dumps(bench.rank_of(Path(folder), int(rank), int(world))))

    monkeypatch.setattr(bench, "apart", ranks)


def test_every_layout_resumes_to_one_stream(tmp_path: Path, in_process: None) -> None:
    cfg, megabytes = bench.make_config(tmp_path, 0.4, 0.2)
    assert megabytes > 0.5
    load_tokenizer("bytes").save_pretrained(str(tmp_path / "tokenizer"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    one, two = bench.speeds(cfg, tokenizer, tmp_path)
    assert one["digests"] == two["digests"] and len(one["digests"]) == 3 and one["tokens"] > 400_000
    found = bench.resumed(tmp_path, cfg, [0, 37, 1234])
    assert found[1] == found[2] == found[4] and len(found[1]) == 36
    stream = TokenStream(cfg, tokenizer, bench.SEED, cache_dir=tmp_path / "cache_2")
    stream.position = 1234
    straight = bench.hashes(stream, [1234], 0, 1)
    assert {index: found[4][index] for index in straight} == straight, "as without a stop, from the other cache"
    assert len(set(found[1].values())) > 30, "sequences differ"
