"""Rollouts beside the updates against rollouts between them: how much faster, and what staleness costs.

    python -m bench async_rl

One server (tests/rl/servers, the protocol of vLLM with the native engine behind it) on one core draws for all runs, one
after another; the trainer has the other core. Runs of one seed see the same prompts, from the demo's adapted base. The
bound on staleness goes up, each with and without the mask of eq. 9. Speed and curve come from the same runs, and every
seed runs through all bounds before the next, so that a slow hour meets them all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench.adapted import OUT, ROOT, adapted, read_rows, stage
from bench.registry import benchmark

ITERATIONS, SEEDS, BOUNDS, DELTA, LAST = 20, (1, 2, 3, 4, 5), (0, 2), 0.2, 5
POLICY = (
    "rl.outcome=task rl.prompts_per_step=8 rl.group_size=8 rl.length_penalty=0 optim.lr=2e-4 optim.schedule=constant"
    " optim.warmup_steps=2 rl.eval_prompts=96 train.save_every=1000 rl.servers.health_s=5"
)
SERVER = "--protocol vllm --port 0 --places 48 --max-model-len 512 --missing return_sampling_mask"
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's t of so many pairs less one


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Its URL."""
    command = [sys.executable, "-m", "tests.rl.servers", "--model", str(folder), *SERVER.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            raise RuntimeError(f"the server did not start: {line!r}")
        try:
            yield line.split()[-1]
        finally:
            process.kill()


def figures(folder: Path) -> dict[str, Any]:
    """Of a run: its curve, its speed once it is under way, and how stale it was."""
    rows = [row for row in read_rows(folder) if "reward/mean" in row]
    steady, last = rows[ITERATIONS // 4 : -LAST], rows[-LAST:]  # the last iterations start nothing any more

    def over(name: str, which: list[dict[str, Any]] = steady) -> float | None:
        return round(mean(row[name] for row in which), 4) if name in which[0] else None

    return {
        "tokens_per_s": over("perf/tokens_per_s"),
        "server_idle": over("servers/idle_frac"),
        "wait_s": over("async/wait_s"),
        "sync_s": over("servers/sync_s"),
        "staleness": over("staleness/mean"),
        "staleness_max": max(row.get("staleness/max", 0) for row in rows),
        "mixed": over("staleness/mixed_frac"),
        "dropped": rows[-1].get("staleness/dropped", 0),
        "k3": over("mismatch/k3"),
        "masked": over("policy/off_policy_masked_frac", rows),
        "reward": over("reward/mean", last),
        "heldout": rows[-1]["heldout/accuracy"],
        "curve": [round(row["reward/mean"], 3) for row in rows],
    }


def run(given: str, url: str, seed: int, bound: int, delta: float | None) -> dict[str, Any]:
    name = f"bound_{bound}_{'masked' if delta else 'plain'}_{seed}"
    own = f"rl.max_staleness={bound} rl.off_policy_delta={'null' if delta is None else delta} train.seed={seed}"
    own += f" train.steps={ITERATIONS} rl.eval_every={ITERATIONS}"
    stage(f"{given} {POLICY} {own} rl.engine=vllm rl.servers.urls={url} output_dir={OUT / 'async_rl' / name}")
    found = {"bound": bound, "masked_by": delta, "seed": seed, **figures(OUT / "async_rl" / name)}
    print({key: value for key, value in found.items() if key != "curve"}, flush=True)
    return found


def against(rows: list[dict[str, Any]], bound: int, delta: float | None) -> dict[str, Any]:
    """A setting against no staleness, by pairs of one seed: speed, and what the reward at the end lost."""
    base = {row["seed"]: row for row in rows if row["bound"] == 0}
    mine = [row for row in rows if row["bound"] == bound and row["masked_by"] == delta]
    lost = [base[row["seed"]]["reward"] - row["reward"] for row in mine]
    noise = T_95[len(lost)] * stdev(lost) / len(lost) ** 0.5 if len(lost) in T_95 else None
    return {
        "bound": bound,
        "masked_by": delta,
        "times_as_fast": round(mean(row["tokens_per_s"] / base[row["seed"]]["tokens_per_s"] for row in mine), 2),
        "reward_lost": round(mean(lost), 4),
        "noise": None if noise is None else round(noise, 4),  # half of the 95% interval
        "within_noise": None if noise is None else abs(mean(lost)) <= noise,
    }


@benchmark
def async_rl() -> dict[str, Any]:
    """Asynchronous RL against synchronous: speed and reward by staleness (about 12 minutes beside the demo's base)."""
    given = adapted()["commands"]["grpo"]
    settings = [(bound, delta) for bound in BOUNDS for delta in ((None, DELTA) if bound else (None,))]
    with served(OUT / "adapted" / "hf") as url:
        rows = [run(given, url, seed, bound, delta) for seed in SEEDS for bound, delta in settings]
    compared = [against(rows, bound, delta) for bound, delta in settings if bound]
    faster = all(row["times_as_fast"] > 1 for row in compared)
    kept = all(row["staleness_max"] <= row["bound"] for row in rows)
    config = {"policy": POLICY, "iterations": ITERATIONS, "server": SERVER, "delta": DELTA, "grpo": given}
    return {"config": config, "rows": rows, "compared": compared, "passed": faster and kept}
