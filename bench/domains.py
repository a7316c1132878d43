"""GRPO on three domains at once from the sparse-adapted base: held-out accuracy of each before and after, three seeds.

The GRPO stage of launch/demo.py with another `train.seed`, from one base. Accuracy is that of `+stage=evaluate`: one
sample a problem, 256 problems of each domain where it has as many.
"""

from __future__ import annotations

from typing import Any

from bench.adapted import OUT, adapted, evaluation, read_rows, stage
from bench.registry import benchmark

SEEDS = (0, 1, 2)


@benchmark
def domains() -> dict[str, Any]:
    """GRPO on three domains at once, three seeds (about 20 minutes on two cores)."""
    plan = adapted()
    given, names = plan["commands"], plan["domains"]
    before = evaluation(OUT / "before_rl", given["adapted_eval"])["by_domain"]
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        folder = OUT / f"grpo_seed_{seed}"
        stage(f"{given['grpo']} train.seed={seed} output_dir={folder}", ranks=2)
        after = evaluation(OUT / f"{folder.name}_eval", f"{given['grpo_eval']} init_from={folder}")["by_domain"]
        metrics = read_rows(folder)
        curve = {
            name: [(row["step"], round(row[key], 3)) for row in metrics if key in row]
            for name, key in ((name, f"heldout/{name}/accuracy") for name in names)
        }
        rows.append({"seed": seed, "before": before, "after": after, "curve": curve})
        print(rows[-1], flush=True)
    least = min((row["after"][name] - before[name]) / max(1e-9, 1 - before[name]) for row in rows for name in names)
    wanted = plan["min_righted"]
    return {"config": {**given, "min_righted": wanted}, "rows": rows, "righted": least, "passed": least >= wanted}
