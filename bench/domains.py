"""GRPO on three domains at once from the sparse-adapted base: held-out accuracy of each before and after, three seeds.

The GRPO stage of launch/demo.py with another `train.seed`, from one base. Accuracy is that of `+stage=evaluate`: one
sample a problem, 256 problems of each domain where it has as many.
"""

from __future__ import annotations

import shutil
from typing import Any

from bench.adapted import OUT, adapted, by_domain, evaluation, read_rows, stage
from bench.registry import benchmark
from launch.demo import FULL, commands

SEEDS = (0, 1, 2)


@benchmark
def domains() -> dict[str, Any]:
    """GRPO on three domains at once, three seeds (about 25 minutes on two cores)."""
    adapted()
    given = dict(commands(FULL, OUT))
    before = by_domain(evaluation(OUT / "before_rl", given["adapted_eval"]))
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        folder = OUT / f"domains_{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        stage(f"{given['grpo']} train.seed={seed} output_dir={folder}", ranks=2)
        after = evaluation(OUT / f"domains_{seed}_eval", f"{given['grpo_eval']} init_from={folder}")
        curve = {
            name: [(row["step"], round(row[key], 3)) for row in read_rows(folder) if key in row]
            for name in FULL.tasks
            for key in [f"heldout/{name}/accuracy"]
        }
        rows.append({"seed": seed, "before": before, "after": by_domain(after), "curve": curve})
        print(rows[-1], flush=True)
    gains = [row["after"][name] - before[name] for row in rows for name in FULL.tasks]
    return {"config": {**given, "min_gain": FULL.min_gain}, "rows": rows, "passed": min(gains) >= FULL.min_gain}
