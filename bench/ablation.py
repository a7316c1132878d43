"""What each of GRPO's stabilisers buys: runs under deliberate staleness with one of them switched off at a time.

The iteration takes eight optimiser steps on the same samples and the sampler is another model than the trainer (see
bench/other_sampler.py), as where an inference engine draws. All runs start from one sparse-adapted base; those
of one seed see the same prompts and the same held-out problems. The table goes into docs/grpo.md.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from bench.adapted import OUT, ROOT, adapted, read_rows, stage
from bench.registry import benchmark

NOISE = 0.1
ITERATIONS, LAST, SEEDS = 24, 5, (1, 2, 3)
POLICY = (
    "rl.outcome=task rl.prompts_per_step=12 rl.group_size=8 rl.mini_batches=8 rl.length_penalty=0 rl.top_p=0.9"
    " rl.beta=0.01 rl.off_policy_delta=0.3 optim.lr=1e-4 optim.schedule=constant optim.warmup_steps=2"
    f" train.steps={ITERATIONS} rl.eval_every={ITERATIONS // 3} rl.eval_prompts=192 train.save_every=1000"
)
CELLS = {
    "all on": "",
    "without Keep Routing": "rl.keep_routing=false",
    "without Keep Sampling Mask": "rl.keep_sampling_mask=false",
    "without off-policy masking": "rl.off_policy_delta=null",
    "plain K3 instead of the unbiased KL": "rl.kl_estimator=k3",
    "without KL": "rl.beta=0",
    "without clipping": "rl.clip_low=1 rl.clip_high=1e6",
    "all on, pi_old the trainer's own, weights up to 2": "rl.old_logprobs=trainer rl.importance_cap=2",
    "none of them": "rl.keep_routing=false rl.keep_sampling_mask=false rl.off_policy_delta=null rl.beta=0"
    " rl.clip_low=1 rl.clip_high=1e6",
}
CONTROL = "one step an iteration, the trainer's own sampler"


def figures(folder: Path) -> dict[str, float | None]:
    """What the table shows of a run, and a little more; `kl_ref` None where no reference is kept."""
    rows = read_rows(folder)
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
        "kl_ref": mean(row["policy/kl_ref"] for row in last) if "policy/kl_ref" in last[-1] else None,
        "worst_norm": max(row["optim/grad_norm"] for row in rows),
        "length": mean(row["rollout/length_mean"] for row in last),
    }


COLUMNS = {  # of the table: heading -> figure, digits
    "held-out accuracy": ("final", 3),
    "best on the way": ("best", 3),
    "sampler against trainer, K3": ("k3", 4),
    "same experts": ("route_agree", 2),
    "clipped": ("clip_frac", 3),
    "masked": ("masked_frac", 3),
    "KL to the start": ("kl_ref", 3),
    "largest gradient": ("worst_norm", 2),
}
BEGIN, END = "<!-- python -m bench ablation -->\n", "<!-- end -->\n"


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, of accuracies the range behind them."""
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for name in dict.fromkeys(row["off"] for row in rows):
        cells = []
        for key, digits in COLUMNS.values():
            values = [row[key] for row in rows if row["off"] == name]
            if None in values:
                cells.append("not measured")
                continue
            spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if key == "final" else ""
            cells.append(f"{mean(values):.{digits}f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_table(rows: list[dict[str, Any]], path: Path = ROOT / "docs" / "grpo.md") -> None:
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{path} has no place for the table"
    path.write_text(f"{before}{BEGIN}{table(rows)}{END}{after}", encoding="utf-8")


def folder_name(cell: str) -> str:
    """The cell's name without what a command line would read otherwise."""
    return re.sub(r"[^\w-]+", "_", cell)


def run(grpo: str, name: str, seed: int, changes: str, noise: float) -> dict[str, Any]:
    """One run on one core; `grpo`: the demo's."""
    folder = OUT / "ablation" / f"{folder_name(name)}_{seed}"
    arguments = f"{grpo} {POLICY} train.seed={seed} {changes} output_dir={folder}"
    stage(arguments, program=("-m", "bench.other_sampler", str(noise)))
    found = {"off": name, "seed": seed, **figures(folder)}
    print(found, flush=True)
    return found


@benchmark
def ablation() -> dict[str, Any]:
    """GRPO with each stabiliser off in turn under staleness, three seeds (half an hour on two cores)."""
    grpo = adapted()["commands"]["grpo"]
    cells = [(name, changes, NOISE) for name, changes in CELLS.items()] + [(CONTROL, "rl.mini_batches=1", 0.0)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(run, grpo, name, seed, changes, noise) for seed in SEEDS for name, changes, noise in cells]
    rows = sorted((job.result() for job in jobs), key=lambda row: [name for name, *_ in cells].index(row["off"]))
    write_table(rows)
    return {"config": {"grpo": grpo, "policy": POLICY, "noise": NOISE, "cells": CELLS}, "rows": rows, "passed": True}
