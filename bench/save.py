"""What a checkpoint costs the training: how long a step is held up, and how much slower the steps beside the write are.

One process, one thread, AdamW's state of about 20 M values in fp32, this machine's disk; synchronous and asynchronous
saves take turns in one process, because a shared machine drifts. The cost of a save is what it holds up and what the
steps until it is whole take longer than the quiet ones in between.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.memory import apart, tiny
from bench.registry import benchmark
from conf.schema import ModelConfig, OptimConfig, ParallelConfig
from model import Transformer
from train import checkpoint, distributed
from train.checkpoint import TrainState
from train.engine import Engine
from train.optim import build_optimizer
from train.saver import Saver

KINDS = ("synchronous", "asynchronous")
ROUNDS, TOKENS = 9, 256
MAX_SHARE = 0.5  # of what a synchronous save holds up


def model() -> ModelConfig:
    return replace(tiny(), vocab_size=16384, hidden_size=384, intermediate_size=1152, num_nextn_predict_layers=0)


def seconds(work: Callable[[], Any]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


def measure(folder: Path) -> dict[str, Any]:
    """A row for each way to save: medians over the rounds."""
    torch.set_num_threads(1)
    net, optim = Transformer(model()), OptimConfig(lr=1e-4)
    net.init_weights(0)
    engine = Engine(net, build_optimizer(net, optim), optim, ParallelConfig(zero=1))
    ids = torch.randint(0, net.config.vocab_size, (TOKENS,))
    inputs = {
        **dict.fromkeys(("input_ids", "next_ids", "labels", "mtp_labels"), ids),
        **{"positions": torch.arange(TOKENS), "doc_start": torch.zeros(TOKENS, dtype=torch.int64)},
    }

    def step() -> None:
        out = engine.forward(**inputs, attention="dense")
        assert out.token_logprobs is not None
        engine.backward(-out.token_logprobs.mean(), last=True)
        engine.step({"trunk": 1e-4, "indexer": 0.0})

    for _ in range(3):
        step()
    savers = {kind: Saver(folder / kind, keep=2, background=kind == "asynchronous") for kind in KINDS}
    found: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    for number in range(1, ROUNDS + 1):
        for kind, saver in savers.items():
            row = {"quiet_step_s": statistics.median(seconds(step) for _ in range(3))}
            start, beside = time.monotonic(), []
            saver.save(engine, TrainState(step=number))
            row["held_up_s"] = time.monotonic() - start
            while not (saver.run / f"checkpoints/step_{number}").exists():
                beside.append(seconds(step))
            saver.wait()
            row["whole_after_s"] = time.monotonic() - start
            row["steps_beside"] = len(beside)
            row["cost_s"] = row["held_up_s"] + sum(beside) - len(beside) * row["quiet_step_s"]
            for key, value in row.items():
                found[kind].setdefault(key, []).append(value)
    last = checkpoint.newest(folder / KINDS[0])
    assert last is not None
    (file,) = checkpoint.read_state(last).files
    rows = [
        {"save": kind, **{key: round(statistics.median(values), 3) for key, values in row.items()}}
        for kind, row in found.items()
    ]
    engine.close()
    return {"bytes": file["num_bytes"], "rows": rows}


@benchmark
def save() -> dict[str, Any]:
    """Seconds that a checkpoint holds a step up, written before the next step or beside it."""
    found = apart("bench.save", ".")
    for row in found["rows"]:
        print(
            f"{row['save']:12} {found['bytes'] / 1e6:.0f} MB: holds up {row['held_up_s']:.2f} s, whole after"
            f" {row['whole_after_s']:.2f} s, costs {row['cost_s']:.2f} s; a quiet step {row['quiet_step_s']:.2f} s"
        )
    before, beside = found["rows"]
    config = {"model": asdict(model()), "tokens": TOKENS, "rounds": ROUNDS, "threads": 1, "bytes": found["bytes"]}
    return {
        "config": config,
        "rows": found["rows"],
        "passed": beside["held_up_s"] <= MAX_SHARE * before["held_up_s"],
    }


if __name__ == "__main__":
    with distributed.process_group(), tempfile.TemporaryDirectory(dir=sys.argv[1], prefix=".bench_save_") as scratch:
        print(json.dumps(measure(Path(scratch))))
