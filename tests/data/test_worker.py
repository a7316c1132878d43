"""The token cache: the same bytes from any number of processes, bounds, what a process that fails says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from conf.errors import UserError
from conf.schema import DataConfig
from data import corpus, worker
from data.corpus import open_corpus
from data.sources import Document
from data.split import digest
from data.worker import Recipe, make, make_all, num_workers

CHAT = [{"role": "user", "content": "U?"}, {"role": "assistant", "content": "A"}]


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setattr(corpus, "BATCH_CHARS", 400)
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"{n}: " + "word ü " * (n % 40)} for n in range(150)]
    rows += [{"messages": [{"role": "user", "content": f"Q{n}"}, CHAT[1]]} for n in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return DataConfig(source="files", path=str(path), heldout=0.2)


def documents(count: int) -> list[list[Document]]:
    return [[Document(digest(str(n)), f"x:{n}", text=f"text {n}")] for n in range(count)]


def files(cache: Path) -> dict[str, bytes]:
    (entry,) = cache.iterdir()
    return {name: (entry / name).read_bytes() for name in ("tokens.bin", "offsets.npy")}


def test_the_bytes_on_disk_are_the_same_from_any_number_of_processes(
    cfg: DataConfig, trained_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a) or popen(*a, **k))
    found = {}
    for workers in (1, 2, 3):
        cache = tmp_path / str(workers)
        one = replace(cfg, workers=workers, dedup=0.9)
        found[workers] = (
            files(cache) if open_corpus(one, trained_tokenizer, "train", cache_dir=cache) else {},
            len(started),
        )
    assert found[1][0] == found[2][0] == found[3][0]
    assert [count for _, count in found.values()] == [0, 2, 5], "processes did it"


def test_a_cache_that_one_number_of_processes_wrote_serves_another(
    cfg: DataConfig, byte_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_corpus(replace(cfg, workers=2), byte_tokenizer, "train", cache_dir=tmp_path / "c")
    monkeypatch.setattr(corpus, "documents", lambda *a, **k: pytest.fail("tokenised again"))
    assert (
        open_corpus(replace(cfg, workers=1), byte_tokenizer, "train", cache_dir=tmp_path / "c").digest == first.digest
    )


def test_max_documents_and_max_tokens_bound_what_is_read(cfg: DataConfig, byte_tokenizer) -> None:
    whole = open_corpus(cfg, byte_tokenizer, "train")
    few = replace(cfg, max_documents=50)
    counts = [open_corpus(few, byte_tokenizer, split).num_documents for split in ("train", "heldout")]
    assert sum(counts) == 50 and min(counts) > 0
    short = open_corpus(replace(cfg, max_tokens=900, workers=2), byte_tokenizer, "train")
    assert 900 <= short.num_tokens < 900 + 300 and (short.tokens == whole.tokens[: short.num_tokens]).all()


@pytest.mark.parametrize("workers", [1, 8])
def test_a_row_past_the_bound_stops_nothing_however_far_the_readers_are_ahead(
    cfg: DataConfig, byte_tokenizer, workers: int
) -> None:
    path = Path(str(cfg.path))
    path.write_text("\n".join([*path.read_text().splitlines()[:150], "no JSON"]))
    bounded = replace(cfg, max_bad_rows=0, workers=workers, heldout=1e-9)
    assert open_corpus(replace(bounded, max_tokens=22000), byte_tokenizer, "train").num_tokens < 22300
    with pytest.raises(UserError, match="rows.jsonl:151: not JSON"):
        open_corpus(bounded, byte_tokenizer, "train")


def test_a_users_mistake_in_a_process_comes_back_as_one(byte_tokenizer) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    batches = [[Document("k", "x:1", messages=CHAT)]] * 6
    with pytest.raises(UserError, match="the tokenizer has no .* which conversations need"):
        list(make_all(iter(batches), Recipe(bare, "train", 1e-9), 2))
    broken = [[Document("k", "x:1", text=5)]] * 6  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="Traceback"):
        list(make_all(iter(broken), Recipe(byte_tokenizer, "train", 1e-9), 2))


def test_a_process_that_is_killed_is_named_and_leaves_none_behind(byte_tokenizer, monkeypatch) -> None:
    pids: list[int] = []
    start = worker._Process.__init__

    def watched(self, recipe: Recipe) -> None:
        start(self, recipe)
        pids.append(self.process.pid)

    monkeypatch.setattr(worker._Process, "__init__", watched)
    results = make_all(iter(documents(40)), Recipe(byte_tokenizer, "train", 1e-9), 2)
    next(results)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"a tokenising process ended with status -9 \(-9: out of memory\?\)"):
        list(results)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_reader_that_stops_early_ends_the_processes_and_was_never_far_ahead(byte_tokenizer, monkeypatch) -> None:
    taken = []
    ended = []
    end = worker._Process.end
    monkeypatch.setattr(worker._Process, "end", lambda self: ended.append(1) or end(self))
    source = (taken.append(1) or batch for batch in documents(1000))
    results = make_all(source, Recipe(byte_tokenizer, "train", 1e-9), 2)
    first = next(results)
    results.close()
    assert first[1][0].tokens is not None and len(ended) == 2 and len(taken) < 20


def test_documents_of_the_other_split_get_a_signature_and_no_tokens(byte_tokenizer) -> None:
    batch = [one for (one,) in documents(40)]
    made = make(batch, Recipe(byte_tokenizer, "train", 0.5, signatures=True))
    assert {one.tokens is None for one in made} == {True, False} and all(one.signature is not None for one in made)
    assert all(one.signature is None for one in make(batch, Recipe(byte_tokenizer, "train", 0.5)))


def test_zero_workers_is_one_a_cpu_with_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)))
    assert num_workers(0) == 5 and num_workers(3) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(500)))
    assert num_workers(0) == 16
