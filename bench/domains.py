"""GRPO on three domains at once from the sparse-adapted base: held-out accuracy of each before and after, three seeds.

The demo's own GRPO stage (launch/demo.py) with another `train.seed`; the base is one. Measured on the problems of
`+stage=evaluate`, 256 of each domain where it has as many.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from bench.adapted import OUT, adapted, stage
from bench.registry import benchmark
from launch.demo import FULL, accuracy, commands

SEEDS = (0, 1, 2)
MIN_GAIN = FULL.min_gain


def measured(name: str, arguments: str, folder: Path) -> dict[str, float]:
    stage(f"{arguments} train.eval_sequences=2 tracker=none output_dir={folder}", ranks=2)
    found = json.loads((folder / "evaluation.json").read_text())
    return {domain: round(accuracy(found, domain), 3) for domain in FULL.tasks}


@benchmark
def domains() -> dict[str, Any]:
    """GRPO on three domains at once, three seeds (about 25 minutes on two cores)."""
    adapted()
    given = dict(commands(FULL, OUT))
    rows = [{"seed": None, "of": "base", **measured("base", given["adapted_eval"], OUT / "domains_base")}]
    for seed in SEEDS:
        folder = OUT / f"domains_{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        stage(f"{given['grpo']} train.seed={seed} tracker=none output_dir={folder}", ranks=2)
        evaluate = given["grpo_eval"].replace(f"{OUT}/grpo ", f"{folder} ")
        curve = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        points = {
            name: [(row["step"], round(row[key], 3)) for row in curve if (key := f"heldout/{name}/accuracy") in row]
            for name in FULL.tasks
        }
        rows.append({"seed": seed, **measured(str(seed), evaluate, OUT / f"domains_{seed}_eval"), "curve": points})
        print(rows[-1], flush=True)
    gains = [row[name] - rows[0][name] for row in rows[1:] for name in FULL.tasks]
    config = {"grpo": given["grpo"], "base": given["base"], "adapted": given["adapted"], "min_gain": MIN_GAIN}
    assert all(math.isfinite(gain) for gain in gains)
    return {"config": config, "rows": rows, "passed": min(gains) >= MIN_GAIN}
