"""`launch/corpus.py`: the table and the JSON, and a cache in which the stage finds its tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.load import load
from data import corpus
from launch import corpus as command


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    rows = [json.dumps({"text": f"document {n} " + "of some words " * (n % 7)}) for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    return [
        f"output_dir={tmp_path}/runs/a", "data.source=files", f"data.path={tmp_path}/rows.jsonl", "data.seq_len=128",
        "data.tokenizer=train:300", "data.packing=best_fit", "tracker=none",
    ]  # fmt: skip


def test_it_prints_writes_and_fills_the_cache_of_the_stage(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = ["parallel.ep=8", "parallel.cp=2", "parallel.zero=3"]
    assert command.main([*settings, *cluster]) == 0, "one process looks at the data of a run of many"
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "runs/a/data.json").read_text())
    assert found["packing"] == "best_fit" and found["sources"][0]["documents"] > 40
    assert "documents               " in out and f"written to {tmp_path}/runs/a/data.json" in out
    assert sorted(path.name for path in (tmp_path / "runs/a").iterdir()) == ["data.json"], "no run is begun"

    from train import distributed
    from train.loop import open_stream
    from train.run import open_run

    monkeypatch.setattr(corpus, "documents", lambda *a, **k: pytest.fail("tokenised again"))
    loaded = load(["+stage=pretrain", *settings])
    with distributed.process_group():
        context = open_run(loaded.config, loaded.overrides)
        assert context is not None
        with context:
            stream = open_stream(context)
    assert stream.state()["next_sequence"] == 0
    assert "data (best_fit): " in capsys.readouterr().out, "rank 0 says what it reads"


def test_evaluate_shows_the_held_out_split(settings: list[str], tmp_path: Path, capsys) -> None:
    assert command.main(["+stage=pretrain", *settings, "data.heldout=0.3"]) == 0
    train = json.loads((tmp_path / "runs/a/data.json").read_text())["sources"][0]["documents"]
    assert 30 < train < 55 and capsys.readouterr().out.startswith("training a tokenizer of 300 tokens\ntrain split")
    from model import Transformer
    from model.hf import save_pretrained

    small = ["model.vocab_size=300", "model.hidden_size=64", "model.num_hidden_layers=2"]
    save_pretrained(Transformer(load(["+stage=pretrain", *small]).config.model), tmp_path / "base")
    evaluation = ["+stage=evaluate", f"init_from={tmp_path}/base", "train.eval_sequences=3", "tracker=none"]
    assert command.main([*evaluation, *settings[:-1], "data.heldout=0.3"]) == 0
    (source,) = json.loads((tmp_path / "runs/a/data.json").read_text())["sources"]
    told = capsys.readouterr().out
    assert source["documents"] == 60 - train and "heldout split" in told
    passes = float(told.split("passes of one replica")[1].split()[0])
    assert passes == pytest.approx(3 / source["epoch"]["sequences"], rel=0.01), "evaluate's own number of sequences"


def test_mistakes_end_in_one_line(settings: list[str], capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    no_folder = f"output_dir={tmp_path}/rows.jsonl/a"
    for wrong, reason in (
        (["data.pack=x"], "unknown key data.pack"),
        (["data.path=/nowhere"], "matches no file"),
        ([no_folder], "where tokens are kept beside output_dir, cannot be written (Not a directory)"),
    ):
        assert command.main([*settings, *wrong]) == 2
        err = capsys.readouterr().err
        assert reason in err and err.count("\n") == 1
