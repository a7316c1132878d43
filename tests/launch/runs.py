"""Run folders as a stage leaves them, with plausible curves: for tests of the report, and to look at it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

CONFIG = """\
stage: {stage}
output_dir: {out}
train:
  steps: {steps}
  seed: {seed}
optim:
  lr: {lr}
precision:
  name: fp32
"""


def common_metrics(step: int, noise: random.Random, start: float) -> dict[str, Any]:
    """What every training stage logs."""
    wild = abs(1 + 0.4 * noise.gauss(0, 1))
    return {
        "tokens": step * 1024,
        "loss/lm": start * math.exp(-step / 120) + 2.1 + 0.05 * noise.gauss(0, 1),
        "loss/mtp": 1.2 * start * math.exp(-step / 140) + 2.6 + 0.06 * noise.gauss(0, 1),
        "moe/load_max_over_mean": 1.15 + 0.9 * math.exp(-step / 60) + 0.05 * abs(noise.gauss(0, 1)),
        "optim/grad_norm": 0.4 + 8 * math.exp(-step / 25) * wild + 0.05 * abs(noise.gauss(0, 1)),
        "optim/lr": 1e-3 * min(1.0, step / 20) * (0.55 + 0.45 * math.cos(math.pi * step / 400)),
        "perf/tokens_per_s": 4200 + 250 * noise.gauss(0, 1),
        "perf/model_tflops": 0.051 + 0.002 * noise.gauss(0, 1),
        "perf/peak_memory_bytes": 1.31e9,
    }


def indexer_metrics(step: int, noise: random.Random, layers: int, speed: float) -> dict[str, Any]:
    """Averages and per-layer values of the indexer."""
    row: dict[str, Any] = {}
    left = math.exp(-step * speed / 60)
    kls = [(0.9 - 0.6 * i / layers) * left + 0.02 * (1 + i % 9) * (1 + 0.1 * noise.gauss(0, 1)) for i in range(layers)]
    for i, kl in enumerate(kls):
        captured = 1 - kl / 1.1
        row[f"indexer/layer_{i:02d}/kl"] = kl
        row[f"indexer/layer_{i:02d}/kl_captured"] = captured
        row[f"indexer/layer_{i:02d}/mass_recall"] = 0.55 + 0.4 * captured - 0.1 * i / layers
        row[f"indexer/layer_{i:02d}/recall_of_oracle"] = min(0.999, 0.6 + 0.4 * captured)
    for name in ("kl_captured", "mass_recall", "recall_of_oracle"):
        row[f"indexer/{name}"] = sum(row[f"indexer/layer_{i:02d}/{name}"] for i in range(layers)) / layers
    return {"loss/indexer_kl": sum(kls) / layers, "indexer/kl_uniform": 1.1 + 0.01 * noise.gauss(0, 1), **row}


def rl_metrics(step: int, noise: random.Random) -> dict[str, Any]:
    """What GRPO adds."""
    reward = 0.9 / (1 + math.exp(-(step - 60) / 20)) + 0.03 * noise.gauss(0, 1)
    return {
        "reward/mean": reward,
        "reward/exact": max(0.0, reward - 0.04),
        "rollout/length_mean": 21 + 4 * math.exp(-step / 40) + noise.gauss(0, 0.4),
        "rollout/truncated_frac": max(0.0, 0.2 * math.exp(-step / 30) + 0.01 * noise.gauss(0, 1)),
        "policy/clip_frac": abs(0.01 * noise.gauss(0, 1)),
        "policy/kl_ref": 1e-4 * step + 1e-5 * abs(noise.gauss(0, 1)),
        "mismatch/k3": 1e-7 * (1 + abs(noise.gauss(0, 1))),
        "mismatch/route_agree": 1.0,
    }


def write_run(
    folder: Path, stage: str = "pretrain", steps: int = 120, every: int = 2, layers: int = 4, seed: int = 0
) -> Path:
    """A finished run of `stage` with metrics, config and, for grpo, samples."""
    folder.mkdir(parents=True, exist_ok=True)
    noise, lines = random.Random(seed), []
    for step in range(every, steps + 1, every):
        row = {"step": step, **common_metrics(step, noise, 5.0 if stage == "pretrain" else 0.4)}
        if stage in ("dense_warmup", "sparse_adapt"):
            row |= indexer_metrics(step, noise, layers, 1.0 if stage == "dense_warmup" else 4.0)
        if stage == "grpo":
            row |= rl_metrics(step, noise)
        lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    lr = {"pretrain": 3e-4, "dense_warmup": 1e-3}.get(stage, 1e-5)
    (folder / "config.yaml").write_text(CONFIG.format(stage=stage, out=folder.name, steps=steps, seed=seed, lr=lr))
    if stage == "grpo":
        with open(folder / "samples.jsonl", "w") as file:
            for step in range(1, 9):
                text = f"7+8=15,{step}+3+1=8</think>85"
                sample = {"step": step, "domain": "arithmetic", "prompt": "47+38=?", "answer": "85", "text": text}
                sample |= {"reward": 1.0, "reward_parts": {"exact": 1.0}, "advantage": 0.25}
                file.write(json.dumps(sample | {"finish_reason": "stop", "tokens": 17}) + "\n")
    return folder


def summary_row(quality: float, accuracy: float | None) -> dict[str, Any]:
    """One row of the demo's table."""
    return {
        "loss/lm_dense": 2.2 - 0.1 * quality,
        "loss/lm_sparse": 2.23 - 0.1 * quality,
        "indexer/kl_captured": quality,
        "indexer/mass_recall": 0.2 + 0.7 * quality,
        "indexer/recall_of_oracle": 0.3 + 0.69 * quality,
        "indexer/recall_of_oracle_min": 0.29 + 0.69 * quality,
        "reward/accuracy": accuracy,
        "perf/tokens_per_s": 4200.0 + 300 * quality,
        "perf/peak_memory_bytes": 1.31e9,
    }
