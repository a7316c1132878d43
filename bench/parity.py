"""Dense-continued against DSA from one base on the same tokens, over seeds: launch/pipeline.py's recipe ablation_tiny.

The runs lie under runs/ablation_tiny; what is finished there is not run again: remove the folder to measure anew. The
promise: on held-out text DSA is no more than a hundredth above the dense control.
"""

from __future__ import annotations

import json
from typing import Any

from bench.adapted import ROOT, run_python
from bench.registry import benchmark

RECIPE = "ablation_tiny"
MAX_PARITY = 0.01  # of DSA's loss over the control's, relative


@benchmark
def parity() -> dict[str, Any]:
    """The parity table of a tiny model, three seeds (about 15 minutes on an idle core)."""
    print(run_python("launch/pipeline.py", RECIPE), flush=True)
    out = ROOT / "runs" / RECIPE
    found = json.loads((out / "parity.json").read_text())
    stages = json.loads((out / "pipeline.json").read_text())["stages"]
    rows = found.pop("rows")
    (loss,) = (row for row in rows if row["metric"] == "loss/lm")
    return {
        "config": {"recipe": (ROOT / "conf" / "recipes" / f"{RECIPE}.yaml").read_text().splitlines(), **found},
        "seconds": {name: entry["seconds"] for name, entry in stages.items()},
        "rows": rows,
        "passed": loss["difference"]["mean"] <= MAX_PARITY * loss["control"]["mean"],
    }
