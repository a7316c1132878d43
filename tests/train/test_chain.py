"""Stages one after another: what a border keeps, what it hands on, and that it can be crossed after an interruption."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import train.loop
from conf.convert import load_yaml
from conf.schema import DataConfig, OptimConfig, PrecisionConfig, RunConfig
from launch import stage as entry
from model.hf import from_pretrained
from model.hf_names import stored_dtype
from tests.distributed.helper import run_ranks
from tests.train import runs, tiny
from train.run import open_run

CHAIN = ("pretrain", "dense_warmup", "sparse_adapt", "sft")
SIZES = (
    "data.source=synthetic data.seq_len=64 train.steps=2 train.log_every=1 train.save_every=2 tracker=none"
).split()


def on_text(run: RunConfig) -> None:
    """Runs it on its own data: in `tiny.batch` there is nothing for attention, and so for the indexer, to find."""

    def one() -> None:
        context = open_run(run, frozenset())
        assert context is not None
        with context:
            train.loop.train(context)

    run_ranks(one, 1)


def test_dense_warmup_teaches_the_indexer_and_changes_no_bit_of_the_dense_model(tmp_path: Path) -> None:
    base, changes = tmp_path / "base", {"steps": 40, "save_every": 40, "optim": OptimConfig(lr=1e-2, warmup_steps=2)}
    data = DataConfig(source="synthetic", seq_len=64, tokenizer="bytes")
    on_text(replace(runs.config(base, **changes), data=data))
    on_text(replace(runs.config(tmp_path / "run", "dense_warmup", init_from=str(base), **changes), data=data))

    before, after = runs.weights(base), runs.weights(tmp_path / "run")
    assert before.keys() == after.keys()
    indexer = {name for name in before if ".indexer." in name}
    assert {name for name in before if not torch.equal(before[name], after[name])} == indexer
    nets = [from_pretrained(folder / "hf") for folder in (base, tmp_path / "run")]
    ids = torch.stack([tiny.batch(index, 64)["input_ids"] for index in range(100, 103)])
    with torch.no_grad():
        dense = [net.logits(ids, attention="dense") for net in nets]
        sparse = [net.logits(ids, attention="sparse") for net in nets]
    assert torch.equal(*dense)
    assert not torch.equal(*sparse)  # the selection did change

    rows = runs.rows(tmp_path / "run")
    assert rows[0]["indexer/kl_captured"] < 0.3  # fresh: no better than uniform
    assert rows[-1]["indexer/kl_captured"] > 0.7, [row["indexer/kl_captured"] for row in rows]
    assert rows[-1]["loss/indexer_kl"] < 0.3 * rows[-1]["indexer/kl_uniform"]


def test_bf16_runs_from_stage_to_stage(tmp_path: Path) -> None:
    start = None
    for seed, stage in enumerate(CHAIN[:3]):  # another seed each: fresh weights would be far from those given
        run = runs.config(tmp_path / stage, stage, init_from=start, steps=3, save_every=3, seed=seed)
        assert runs.go(replace(run, precision=PrecisionConfig("bf16"))) == ["finished"]
        rows = runs.rows(tmp_path / stage)
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert all(isinstance(value, int | float) and math.isfinite(value) for row in rows for value in row.values())
        saved = runs.weights(tmp_path / stage)
        assert {name: value.dtype for name, value in saved.items()} == {
            name: stored_dtype(name, torch.bfloat16) for name in saved
        }
        assert saved["model.layers.0.self_attn.o_proj.weight"].dtype == torch.bfloat16
        if start is not None:  # a trunk that came from the stage before, not from a fresh initialisation
            given = runs.weights(Path(start))
            moved = {name for name in saved if not torch.equal(saved[name], given[name])}
            indexer = {name for name in saved if ".indexer." in name}
            assert moved
            assert stage != "dense_warmup" or moved <= indexer
            name = "model.embed_tokens.weight"
            assert torch.allclose(saved[name].float(), given[name].float(), atol=0.05)
        start = str(tmp_path / stage)


def run_chain(folder: Path, hooks: Sequence[runs.Hook | None]) -> list[list[str]]:
    """The chain with a hook a stage; a stage that the hook ended is started once more."""
    start, ends = None, []
    for stage, hook in zip(CHAIN, hooks, strict=True):
        run = runs.config(folder / stage, stage, init_from=start, steps=4)
        try:
            ends.append(runs.go(run, hook=hook))
        except AssertionError as died:
            ends.append([str(died)])
        if hook is not None:
            assert not (folder / stage / "hf").exists()
            assert runs.go(run) == ["finished"]
        start = str(folder / stage)
    return ends


def stop_at(index: int) -> runs.Hook:
    """Asks the process to stop, as a scheduler would, when it asks for the global sequence `index`."""

    def hook(asked: int) -> None:
        if asked == index:
            os.kill(os.getpid(), signal.SIGTERM)

    return hook


def test_chain_with_every_stage_interrupted_ends_in_the_same_bits(tmp_path: Path) -> None:
    assert run_chain(tmp_path / "whole", [None] * 4) == [["finished"]] * 4
    hooks = [runs.die_at(5), stop_at(2), stop_at(5), runs.die_at(4)]  # two sequences a step, saved after step 2
    killed, stopped = ["rank -> exit status of those that died: {0: 9}"], ["exit 143"]
    assert run_chain(tmp_path / "broken", hooks) == [killed, stopped, stopped, killed]
    for stage in CHAIN:
        one, other = runs.weights(tmp_path / "whole" / stage), runs.weights(tmp_path / "broken" / stage)
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == [], stage
        assert runs.rows(tmp_path / "whole" / stage) == runs.rows(tmp_path / "broken" / stage)


def test_sparse_adapt_finds_the_warmed_up_run_beside_it(tmp_path: Path) -> None:
    """As a user: no init_from, output_dir, model or tokenizer given; what is not there is found under ./runs."""
    folder, start = tmp_path / "runs", None
    for stage in CHAIN[:2]:
        assert runs.go(runs.config(folder / stage, stage, init_from=start)) == ["finished"]
        start = str(folder / stage)
    argv = [sys.executable, entry.__file__, "+stage=sparse_adapt", *SIZES]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "init_from=runs/dense_warmup" in done.stdout.splitlines()
    assert [row["step"] for row in runs.rows(folder / "sparse_adapt")] == [1, 2]
    found = load_yaml(folder / "sparse_adapt" / "config.yaml")
    assert found.init_from == "runs/dense_warmup"
    assert found.model == load_yaml(folder / "dense_warmup" / "config.yaml").model
    given, saved = runs.weights(folder / "dense_warmup"), runs.weights(folder / "sparse_adapt")
    assert given.keys() == saved.keys()
    assert max(float((saved[name] - given[name]).abs().max()) for name in given) < 0.02  # two small steps from there
    assert not (folder / "sparse_adapt" / "error.txt").exists()
