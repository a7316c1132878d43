"""What sparse attention keeps of the needles that dense attention finds, by length, on a tiny model trained for it:
launch/pipeline.py's recipe needles_tiny.

The runs lie under runs/needles_tiny; what is finished there is not run again: remove the folder to measure anew. The
promise: among the lengths where dense attention finds four needles in five is 2,048 tokens, and at none of them, up to
there, does sparse fall outside dense's noise (train/verdict.py).
"""

from __future__ import annotations

import json
from typing import Any

from bench.adapted import ROOT, run_python
from bench.registry import benchmark

RECIPE = "needles_tiny"
MUST_HOLD = 2048


@benchmark
def needles() -> dict[str, Any]:
    """Needles, dense against sparse, by length, and the k that would have been enough."""
    print(run_python("launch/pipeline.py", RECIPE), flush=True)
    out = ROOT / "runs" / RECIPE
    found = json.loads((out / "measured" / "evaluation.json").read_text())
    stages = json.loads((out / "pipeline.json").read_text())["stages"]
    by_length: dict[tuple[str, int], dict[str, Any]] = {}
    for row in found["tasks"]:
        key = (row["task"], row["length"])
        cell = by_length.setdefault(key, {"task": key[0], "length": key[1], "n": 0, "dense": 0, "sparse": 0, "k": {}})
        for name in ("n", "dense", "sparse"):
            cell[name] += row[name]
    for row in found["k_sweep"]:
        by_length[row["task"], row["length"]]["k"][row["k"]] = row["sparse"]
    verdict = found["verdict"]["tasks"]
    departs = verdict["departs_at"]
    return {
        "config": {"recipe": (ROOT / "conf" / "recipes" / f"{RECIPE}.yaml").read_text().splitlines()},
        "seconds": {name: entry["seconds"] for name, entry in stages.items()},
        "rows": list(by_length.values()),
        "verdict": verdict,
        "passed": (verdict["holds_up_to"] or 0) >= MUST_HOLD and (departs is None or departs > MUST_HOLD),
    }
