"""`sparse_adapt` of the tiny model in bf16 and in FP8, step by step on the same data: does FP8 learn as well?

A base and its warm-up are made once, in fp32, on the standard library's sources; each seed then orders the data of both
precisions alike. Compared is the mean loss of the last 50 of 300 steps. About 10 minutes on one idle CPU core.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.registry import benchmark

ROOT = Path(__file__).resolve().parent.parent
STEPS, LAST, SEEDS = 300, 50, (1, 2, 3)
KEYS = ("loss/lm", "loss/indexer_kl", "loss/mtp")
MAX_APART = 0.01  # of the last steps' mean loss
COMMON = "data.source=stdlib data.seq_len=512 train.log_every=1 tracker=none"
BASE = f"+stage=pretrain model=tiny train.steps=300 {COMMON}"
WARMUP = f"+stage=dense_warmup train.steps=100 {COMMON}"
ADAPT = f"+stage=sparse_adapt train.steps={STEPS} {COMMON}"


def stage(folder: Path, arguments: str) -> Path:
    """Runs one stage in a process of its own."""
    command = [sys.executable, "launch/stage.py", *arguments.split(), f"output_dir={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=ROOT, check=True, env=environment, stdout=subprocess.DEVNULL)
    return folder


def curves(run: Path) -> dict[str, list[float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {key: [round(row[key], 5) for row in rows] for key in KEYS}


def end(curve: list[float]) -> float:
    return sum(curve[-LAST:]) / LAST


def tens(curve: list[float]) -> list[float]:
    """Mean of every ten steps."""
    return [round(sum(curve[i : i + 10]) / 10, 4) for i in range(0, len(curve), 10)]


@benchmark
def fp8() -> dict[str, Any]:
    """Loss of sparse_adapt in FP8 against bf16: tiny model, 300 steps, three seeds (about 10 minutes)."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        base = stage(Path(folder) / "base", BASE)
        warm = stage(Path(folder) / "warmup", f"{WARMUP} init_from={base}")
        for seed in SEEDS:
            found = {
                precision: curves(
                    stage(
                        Path(folder) / f"{precision}_{seed}",
                        f"{ADAPT} init_from={warm} train.seed={seed} precision={precision}",
                    )
                )
                for precision in ("bf16", "fp8")
            }
            assert all(len(found[precision]["loss/lm"]) == STEPS for precision in found)
            ends = {precision: {key: end(found[precision][key]) for key in KEYS} for precision in found}
            apart = {key: ends["fp8"][key] / ends["bf16"][key] - 1 for key in KEYS}
            drawn = {precision: {key: tens(found[precision][key]) for key in KEYS} for precision in found}
            rows.append({"seed": seed, "mean_of_last": ends, "fp8_over_bf16_less_1": apart, "means_of_ten": drawn})
            line = ", ".join(
                f"{key} {ends['bf16'][key]:.4f} -> {ends['fp8'][key]:.4f} ({apart[key]:+.3%})" for key in KEYS
            )
            print(f"seed {seed}, bf16 -> fp8: {line}", flush=True)
    config = {"base": BASE, "warmup": WARMUP, "adapt": ADAPT, "last": LAST, "max_apart": MAX_APART}
    passed = all(abs(row["fp8_over_bf16_less_1"][key]) <= MAX_APART for row in rows for key in ("loss/lm", "loss/mtp"))
    return {"config": config, "rows": rows, "passed": passed}
