"""One `dense_warmup` and one `sparse_adapt` step at T = 32K, 64K and 128K: 2 layers, one thread, this machine.

What grows and why: dense attention and the indexer read T/2 keys a row on average, so their time grows 4x with every
doubling; everything else, and all memory, 2x. The prediction of each row comes from the FLOP formulas of the ops'
READMEs at the rate that the row of half its length reached. About an hour: never a part of CI.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import Any

from bench.memory import STAGES, apart, step, tiny
from bench.registry import benchmark
from conf.schema import ModelConfig

BASE, LENGTHS = 1024, (32768, 65536, 131072)
GIB, MAX_BYTES = 2**30, 24 * 2**30


def two_layers() -> ModelConfig:
    """The widths of the CPU figures (8 heads, latent 64 + 16, index 4 x 32) with V3.2's k: 2048."""
    return replace(
        tiny(), num_hidden_layers=2, num_nextn_predict_layers=0, num_attention_heads=8, index_n_heads=4,
        index_topk=2048, vocab_size=512, max_position_embeddings=LENGTHS[-1],
    )  # fmt: skip


def layer_flops(model: ModelConfig, stage: str, length: int) -> dict[str, float]:
    """FLOPs of one layer's attention by what they grow with (formulas: the READMEs under model/ops)."""
    heads, index = model.num_attention_heads, 2 * model.index_n_heads * model.index_head_dim
    pairs = length * (length + 1) / 2
    if stage == "dense_warmup":
        core = 2 * heads * (model.qk_head_dim + model.v_head_dim)
        return {"quadratic": (core + 3 * index) * pairs, "linear": 0.0}
    k = min(model.index_topk, length)
    chosen = k * (k + 1) / 2 + (length - k) * k
    width, latent = model.kv_lora_rank + model.qk_rope_head_dim, model.kv_lora_rank
    sparse = 2 * heads * (width + latent) + 2 * heads * (3 * width + 2 * latent) + 3 * index
    return {"quadratic": index * pairs, "linear": sparse * chosen}


@benchmark
def length() -> dict[str, Any]:
    """Time and peak memory of one training step at 32K, 64K and 128K (about an hour)."""
    rows, passed, model = [], True, two_layers()
    for stage in STAGES:
        base = apart("bench.length", stage, str(BASE))["peak_bytes"]
        before: dict[str, Any] | None = None
        for tokens in LENGTHS:
            row = apart("bench.length", stage, str(tokens))
            row |= {"extra_bytes": row["peak_bytes"] - base, "flops": layer_flops(model, stage, tokens)}
            line = f"{stage:12} T={tokens:6} {row['cpu_seconds']:7.0f} CPU s, peak {row['peak_bytes'] / GIB:.2f} GiB"
            if before is not None:
                row["time_growth"] = round(row["cpu_seconds"] / before["cpu_seconds"], 2)
                row["flop_growth"] = round(sum(row["flops"].values()) / sum(before["flops"].values()), 2)
                row["memory_growth"] = round(row["extra_bytes"] / before["extra_bytes"], 2)
                line += (
                    f"; x{row['time_growth']} in time where the formula says x{row['flop_growth']}, "
                    f"x{row['memory_growth']} in memory"
                )
            print(line, flush=True)
            passed = passed and row["peak_bytes"] <= MAX_BYTES
            rows.append(row)
            before = row
    return {"config": {"model": asdict(model), "threads": 1, "base_T": BASE}, "rows": rows, "passed": passed}


if __name__ == "__main__":
    print(json.dumps(step(sys.argv[1], int(sys.argv[2]), two_layers(), stats=False)))
