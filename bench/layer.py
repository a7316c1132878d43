"""The attention of one layer, forward and backward: sparse with indexer and loss, and the warm-up, against dense SDPA.

Side by side in one process on one thread, the contestants taking turns, the least CPU time of each: a machine's speed
drifts, ratios within a turn hardly do. Extra memory is a process's high-water mark above that of its inputs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.memory import apart, peak_bytes
from bench.registry import benchmark
from model.ops.index_kl_dense import index_kl_dense
from model.ops.index_kl_selected import index_kl_selected
from model.ops.index_topk import index_topk
from model.ops.mla_dense import mla_dense
from model.ops.sparse_mla import sparse_mla

HEADS, LATENT, ROPE, NOPE, VALUE = 8, 64, 16, 32, 32
INDEX_HEADS, INDEX_DIM, TOPK = 4, 32, 256
SCALE = (NOPE + ROPE) ** -0.5
LENGTHS = (2048, 4096, 8192, 16384)
MIN_SPEEDUP = {8192: 2.2, 16384: 3.2}  # of the sparse layer over dense attention
MAX_WARMUP, MAX_WARMUP_BYTES = 1.2, 256_000_000  # of dense forward and backward, from 8K on; at the last length
MIB = 2**20

Contestant = Callable[[], None]


def _leaves(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def _backward(output: Tensor) -> None:
    output.backward(torch.ones_like(output))


def contestants(tokens: int, seconds: dict[str, float] | None = None) -> dict[str, Callable[[], Contestant]]:
    """By name, what makes a contestant's inputs and gives the step to measure; `seconds` takes the sparse layer's
    parts."""
    doc_start = torch.zeros(tokens, dtype=torch.int64)
    index_shapes = (tokens, INDEX_HEADS, INDEX_DIM), (tokens, INDEX_DIM), (tokens, INDEX_HEADS)

    def dense() -> Contestant:
        q, k, v = _leaves(0, *[(tokens, HEADS, NOPE + ROPE)] * 2, (tokens, HEADS, VALUE))
        return lambda: _backward(mla_dense(q, k, v, doc_start, SCALE))

    def sparse() -> Contestant:
        q_nope, q_rope, w_uk, latent, k_rope = _leaves(
            1, (tokens, HEADS, NOPE), (tokens, HEADS, ROPE), (HEADS, NOPE, LATENT), (tokens, LATENT), (tokens, ROPE)
        )
        q_index, k_index, w = _leaves(2, *index_shapes)

        def run() -> None:
            clock = [time.process_time()]
            idx = index_topk(q_index, k_index, w, doc_start, TOPK)
            clock.append(time.process_time())
            attended = sparse_mla(q_nope, q_rope, w_uk, latent, k_rope, idx, SCALE, target=True)
            clock.append(time.process_time())
            assert attended.target is not None
            index_kl_selected(attended.target, idx, q_index, k_index, w).kl_sum.backward()
            clock.append(time.process_time())
            _backward(attended.out)
            clock.append(time.process_time())
            if seconds is not None:
                parts = ("index_topk", "sparse_mla forward", "index_kl_selected", "sparse_mla backward")
                for name, start, stop in zip(parts, clock, clock[1:], strict=False):
                    seconds[name] = min(seconds.get(name, stop - start), stop - start)

        return run

    def warmup(topk: int | None) -> Contestant:
        with torch.no_grad():
            q, k, v = (t.detach() for t in _leaves(3, *[(tokens, HEADS, NOPE + ROPE)] * 2, (tokens, HEADS, VALUE)))
        q_index, k_index, w = _leaves(4, *index_shapes)
        return lambda: index_kl_dense(q, k, v, SCALE, q_index, k_index, w, doc_start, topk)[1].kl_sum.backward()

    return {
        "dense": dense,
        "sparse": sparse,
        "warmup": lambda: warmup(None),
        "warmup_with_stats": lambda: warmup(TOPK),
    }


def _once(step: Contestant) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def measure(tokens: int) -> dict[str, Any]:
    """Least CPU seconds of every contestant at this length, their ratios to dense, and the sparse layer's parts."""
    torch.set_num_threads(1)
    for make in contestants(256).values():
        make()()  # loads what is loaded once
    parts: dict[str, float] = {}
    steps = {name: make() for name, make in contestants(tokens, parts).items()}
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(5 if tokens <= 4096 else 3):
        for name, step in steps.items():
            best[name] = min(best[name], _once(step))
    row: dict[str, Any] = {"T": tokens, "cpu_seconds": {name: round(value, 3) for name, value in best.items()}}
    row["sparse_speedup"] = round(best["dense"] / best["sparse"], 2)
    row["warmup_over_dense"] = round(best["warmup"] / best["dense"], 2)
    row["warmup_with_stats_over_dense"] = round(best["warmup_with_stats"] / best["dense"], 2)
    row["sparse_parts"] = {name: round(value, 3) for name, value in parts.items()}
    return row


def extra_bytes(name: str, tokens: int) -> int:
    """What one step of a contestant adds to this process's high-water mark: gradients, saved tensors, workspace."""
    torch.set_num_threads(1)
    contestants(256)[name]()()
    step = contestants(tokens)[name]()
    before = peak_bytes()
    step()
    return peak_bytes() - before


@benchmark
def layer() -> dict[str, Any]:
    """A sparse layer and a warm-up layer against dense SDPA at 2K to 16K, one thread."""
    rows, broken = [], []
    for tokens in LENGTHS:
        row = apart("bench.layer", "time", str(tokens))
        row["extra_bytes"] = {name: apart("bench.layer", name, str(tokens)) for name in contestants(256)}
        held = ", ".join(f"{name} {size / MIB:.0f}" for name, size in row["extra_bytes"].items())
        print(
            f"T={tokens:6} dense {row['cpu_seconds']['dense']:.2f} CPU s, sparse {row['sparse_speedup']}x faster, "
            f"warm-up {row['warmup_over_dense']}x dense ({row['warmup_with_stats_over_dense']}x with statistics); "
            f"extra MiB: {held}",
            flush=True,
        )
        if row["sparse_speedup"] < MIN_SPEEDUP.get(tokens, 0.0):
            broken.append(f"sparse speed-up {row['sparse_speedup']} at {tokens}, wanted {MIN_SPEEDUP[tokens]}")
        if tokens in MIN_SPEEDUP and row["warmup_over_dense"] > MAX_WARMUP:
            broken.append(f"warm-up {row['warmup_over_dense']}x dense at {tokens}, at most {MAX_WARMUP}")
        rows.append(row)
    extra = rows[-1]["extra_bytes"]
    if extra["sparse"] > extra["dense"]:
        broken.append(f"sparse takes {extra['sparse']} bytes extra, dense {extra['dense']}")
    if extra["warmup"] > MAX_WARMUP_BYTES:
        broken.append(f"warm-up takes {extra['warmup']} bytes extra, at most {MAX_WARMUP_BYTES}")
    for line in broken:
        print(f"not kept: {line}")
    sizes = {"heads": HEADS, "latent": LATENT, "rope": ROPE, "nope": NOPE, "value": VALUE, "index_heads": INDEX_HEADS}
    config = sizes | {"index_dim": INDEX_DIM, "topk": TOPK, "dtype": "float32", "threads": 1}
    return {"config": config, "rows": rows, "not_kept": broken, "passed": not broken}


if __name__ == "__main__":
    what, length = sys.argv[1], int(sys.argv[2])
    print(json.dumps(measure(length) if what == "time" else extra_bytes(what, length)))
