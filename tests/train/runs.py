"""Whole runs of the tiny model in forked processes, with `tiny.batch` as the data and a hook to break them at a
sequence.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import model.hf  # noqa: F401  (imported before the processes fork)
import train.loop
from conf.schema import DataConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrackerConfig, TrainConfig
from data.packing import PackedBatch
from tests.distributed.helper import run_ranks
from tests.train import tiny
from train.checkpoint import newest, read_state
from train.run import RunContext, open_run

MODEL: ModelConfig = replace(tiny.MODEL, vocab_size=256)
Hook = Callable[[int], None]


def config(folder: Path, stage: str = "pretrain", **changes: Any) -> RunConfig:
    """Six steps, saved every second one. `changes`: fields of `train`, and zero or parallel, optim, model, init_from,
    resume."""
    steps = {"steps": 6, "log_every": 1, "save_every": 2, "micro_batches": 2}
    fields = {key: value for key, value in changes.items() if key in TrainConfig.__dataclass_fields__}
    return RunConfig(
        stage=stage,
        output_dir=str(folder),
        init_from=changes.get("init_from"),
        resume=changes.get("resume", "auto"),
        model=changes.get("model", MODEL),
        data=DataConfig(source="synthetic", seq_len=16, tokenizer="bytes"),
        train=TrainConfig(**(steps | fields)),
        optim=changes.get("optim", OptimConfig(warmup_steps=2)),
        parallel=changes.get("parallel", ParallelConfig(zero=changes.get("zero", 1))),
        tracker=TrackerConfig(name="none"),
    )


class _Hooked:
    """A stream of `tiny.batch`; `hook` sees every global index before it is made."""

    def __init__(self, hook: Hook | None) -> None:
        self.hook, self.position = hook, 0

    def take(self, count: int, rank: int = 0, world: int = 1) -> list[PackedBatch]:
        first = self.position + rank * count
        self.position += count * world
        found = []
        for index in range(first, first + count):
            if self.hook is not None:
                self.hook(index)
            found.append(PackedBatch(**tiny.batch(index)))
        return found

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def _run(run: RunConfig, hook: Hook | None, overrides: frozenset[str]) -> str:
    def open_stream(context: RunContext) -> _Hooked:
        context.tokenizer()
        return _Hooked(hook)

    train.loop.open_stream = open_stream  # type: ignore[assignment]  (this process alone)
    context = open_run(run, overrides)
    if context is None:
        return "finished before"
    try:
        with context:
            train.loop.train(context)
    except SystemExit as end:
        return f"exit {end.code}"
    return "finished"


def go(run: RunConfig, world: int = 1, hook: Hook | None = None, overrides: frozenset[str] = frozenset()) -> list[str]:
    """Runs it -> how each rank ended."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401  (before the processes fork: 1.3 s each)

    return run_ranks(_run, world, run, hook, overrides)


def die_at(index: int, saved: Path | None = None) -> Hook:
    """Ends the process as kill -9 would when it asks for the global sequence `index`, but not before the checkpoint
    `saved`, which may be in flight then, is whole."""

    def hook(asked: int) -> None:
        if asked == index:
            if saved is not None:
                wait_for(saved)
            os._exit(9)

    return hook


def wait_for(path: Path, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} is not there after {seconds:.0f} s"
        time.sleep(0.002)


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs from run to run."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in found]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "hf" / "model.safetensors")


def assert_same_checkpoint(one: Path, other: Path, but: str = "rng.") -> None:
    """The same state and tensors, `but` those whose names hold that."""
    states = [read_state(folder) for folder in (one, other)]
    names = [file["name"] for file in states[0].files]
    assert replace(states[0], files=[]) == replace(states[1], files=[])
    for name in names:
        first, second = (load_file(folder / name) for folder in (one, other))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first if but not in key)


def assert_same_run(one: Path, other: Path) -> None:
    """Bit-equal metrics, weights and state; the random states of Python are each process's own."""
    assert rows(one) == rows(other)
    ends = [newest(folder) for folder in (one, other)]
    assert ends[0] and ends[1]
    assert_same_checkpoint(ends[0], ends[1])
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name
