"""What each of GRPO's stabilisers buys: runs under deliberate staleness with one of them switched off at a time.

The iteration takes eight optimiser steps on the same samples and the sampler is another model than the trainer (see
bench/other_sampler.py), as where an inference engine draws. All runs start from one sparse-adapted base and see the
same prompts; a seed changes the samples.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from bench.adapted import ROOT, adapted
from bench.registry import benchmark

NOISE = 0.03
ITERATIONS, LAST, SEEDS = 30, 5, (1, 2, 3)
POLICY = (
    "rl.outcome=task rl.prompts_per_step=12 rl.group_size=8 rl.mini_batches=8 rl.length_penalty=0 rl.top_p=0.9"
    " rl.beta=0.02 rl.off_policy_delta=0.02 optim.lr=3e-4 optim.schedule=constant optim.warmup_steps=2"
    f" train.steps={ITERATIONS} rl.eval_every={ITERATIONS // 3} rl.eval_prompts=96 tracker=none train.save_every=1000"
)
CELLS = {
    "all on": "",
    "without Keep Routing": "rl.keep_routing=false",
    "without Keep Sampling Mask": "rl.keep_sampling_mask=false",
    "without off-policy masking": "rl.off_policy_delta=null",
    "plain K3 instead of the unbiased KL": "rl.kl_estimator=k3",
    "without KL": "rl.beta=0",
    "without clipping": "rl.clip_low=1 rl.clip_high=1e6",
    "advantage over its standard deviation": "rl.advantage_std=true",
    "none of them": "rl.keep_routing=false rl.keep_sampling_mask=false rl.off_policy_delta=null rl.beta=0"
    " rl.clip_low=1 rl.clip_high=1e6",
}
CONTROL = "one step an iteration, the trainer's own sampler"
FIGURES = ("final", "best", "k3", "route_agree", "clip_frac", "kl_ref", "worst_norm", "entropy")


def run(folder: Path, arguments: str, noise: float) -> Path:
    """One GRPO run on one core."""
    command = [sys.executable, "-m", "bench.other_sampler", str(noise), *arguments.split(), f"output_dir={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=ROOT, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder


def figures(folder: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [row["heldout/accuracy"] for row in rows if "heldout/accuracy" in row]
    last = rows[-LAST:]
    return {
        "final": curve[-1],
        "best": max(curve),
        "reward": mean(row["reward/mean"] for row in last),
        "k3": mean(row["mismatch/k3"] for row in last),
        "route_agree": mean(row["mismatch/route_agree"] for row in last),
        "clip_frac": mean(row["policy/clip_frac"] for row in last),
        "masked_frac": mean(row["policy/off_policy_masked_frac"] for row in last),
        "kl_ref": mean(row.get("policy/kl_ref") or 0.0 for row in last),
        "worst_norm": max(row["optim/grad_norm"] for row in rows),
        "length": mean(row["rollout/length_mean"] for row in last),
    }


@benchmark
def ablation() -> dict[str, Any]:
    """GRPO with each stabiliser off in turn under staleness, three seeds (under an hour on two cores)."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        base, tasks = adapted(Path(folder) / "base")
        jobs = {}
        for name, changes in (CELLS | {CONTROL: "rl.mini_batches=1"}).items():
            for seed in SEEDS:
                arguments = f"+stage=grpo init_from={base} {tasks} {POLICY} train.seed={seed} {changes}"
                noise = 0.0 if name == CONTROL else NOISE
                jobs[name, seed] = pool.submit(run, Path(folder) / f"{len(jobs)}", arguments, noise)
        rows = []
        for (name, seed), job in jobs.items():
            rows.append({"off": name, "seed": seed, **figures(job.result())})
            print(rows[-1], flush=True)
    return {"config": {"policy": POLICY, "noise": NOISE, "cells": CELLS}, "rows": rows, "passed": True}
