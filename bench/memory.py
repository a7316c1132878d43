"""Peak memory of one training step by sequence length: nothing of [T, T] may exist, so it must grow linearly.

Each length runs in a process of its own, whose high-water mark is read from the operating system; the extra over the
shortest length leaves out interpreter, weights and optimiser. Linear growth multiplies the extra over 1K by 2.33 from
4K to 8K and by 2.14 from 8K to 16K (`linear` in the rows), since the shortest length is taken off both.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.registry import benchmark
from conf.load import load
from conf.schema import ModelConfig
from model import Transformer

LENGTHS = (1024, 2048, 4096, 8192, 16384)
STAGES: dict[str, dict[str, Any]] = {
    "dense_warmup": {
        "attention": "dense",
        "indexer_loss": "dense",
        "trunk_grad": False,
        "lm_loss": False,
        "stats": True,
    },
    "sparse_adapt": {"attention": "sparse", "indexer_loss": "selected", "stats": True},
}
MAX_DOUBLING = 2.3  # of the extra memory, from the last length but one to the last


def peak_bytes() -> int:
    """This process's own high-water mark; getrusage's starts at its parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("peak memory is read from /proc/self/status, which has no VmHWM here: run this on Linux")


def tiny() -> ModelConfig:
    return load(["+stage=pretrain", "model=tiny"]).config.model


def step(stage: str, length: int, model: ModelConfig, stats: bool = True) -> dict[str, Any]:
    """One step (forward, backward, AdamW) of `model` on one document of `length` tokens, in one thread; `stats`: with
    the health metrics of a logged step, which cost two more selections in warm-up."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Transformer(model)
    net.init_weights(0)
    net.init_indexer(0)
    for number, layer in enumerate(net.layers, start=1):
        say = f"{stage} T={length}: layer {number} of {len(net.layers)} is through after {{:.0f}} CPU s"
        layer.register_forward_hook(lambda *_, say=say: print(say.format(time.process_time()), file=sys.stderr))
    if stage == "dense_warmup":
        net.requires_grad_(False)
        for _, p in net.indexer_parameters():
            p.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(0, net.config.vocab_size, (length + 2,))
    start = time.process_time()
    out = net(
        ids[:-2],
        ids[1:-1],
        ids[1:-1],
        ids[2:],
        torch.arange(length),
        torch.zeros(length, dtype=torch.int64),
        **{**STAGES[stage], "stats": stats},
    )
    loss = out.indexer_kl.sum() / length
    if out.token_logprobs is not None:
        loss = loss - out.token_logprobs.sum() / length
    if out.mtp_logprobs is not None:
        loss = loss - 0.1 * out.mtp_logprobs.sum() / length
    loss.backward()
    optimizer.step()
    peak = peak_bytes()
    return {"stage": stage, "T": length, "peak_bytes": peak, "cpu_seconds": round(time.process_time() - start, 2)}


def apart(module: str, *arguments: str) -> dict[str, Any]:
    """What `python -m module arguments` prints: one measurement in a process of its own, its progress on stderr."""
    command = [sys.executable, "-m", module, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


@benchmark
def memory() -> dict[str, Any]:
    """Peak memory of dense_warmup and sparse_adapt at T = 1K to 16K, tiny model, one thread."""
    rows, passed = [], True
    for stage in STAGES:
        extras: list[int] = []
        shortest: int | None = None
        for length in LENGTHS:
            row = apart("bench.memory", stage, str(length))
            shortest = row["peak_bytes"] if shortest is None else shortest
            extras.append(row["peak_bytes"] - shortest)
            row["extra_bytes"] = extras[-1]
            row["doubling"] = round(extras[-1] / extras[-2], 2) if len(extras) > 2 and extras[-2] else None
            row["linear"] = round((length - LENGTHS[0]) / (length / 2 - LENGTHS[0]), 2) if len(extras) > 2 else None
            peak, extra = row["peak_bytes"] / 2**20, extras[-1] / 2**20
            print(
                f"{stage:12} T={length:6} peak {peak:7.0f} MiB, extra {extra:7.1f} MiB, "
                f"x{row['doubling']}, {row['cpu_seconds']} CPU s",
                flush=True,
            )
            rows.append(row)
        passed = passed and rows[-1]["doubling"] is not None and rows[-1]["doubling"] <= MAX_DOUBLING
    return {
        "config": {"model": asdict(tiny()), "max_doubling": MAX_DOUBLING, "threads": 1},
        "rows": rows,
        "passed": passed,
    }


if __name__ == "__main__":
    print(json.dumps(step(sys.argv[1], int(sys.argv[2]), tiny())))
