"""What it is worth to keep reasoning across tool calls, and to have tools at all: the policies of `make demo-tools`.

Each policy is asked the same held-out problems under each context rule: `v3_2` (thoughts stay until the user speaks),
`drop` (every result costs the thought that led to its call, what V3.2 does away with), and without tools. A further
policy is the demo's GRPO under `drop`: from the same cold start, on the same problems, for as long, so that it can get
used to losing its thoughts.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from bench.adapted import ROOT, evaluation, run_python, stage, without
from bench.registry import benchmark

OUT = Path("runs/demo_tools")  # relative: results hold no path of a machine
WAYS = {"v3_2": "", "drop": "rl.tools.reasoning=drop", "without tools": "rl.use_tools=false"}
KEYS = ("reward/accuracy", "tool/resumed_frac", "tool/calls_mean", "tool/rows_mean", "rollout/length_mean")


def made() -> dict[str, str]:
    """The demo's stages, those that are not finished run now (see the demo) -> their arguments."""
    plan = json.loads(run_python("launch/demo_tools.py", "--list", "--dir", str(OUT)))
    for name, arguments in plan["traces"].items():
        if not (ROOT / OUT / name).exists():
            run_python("launch/traces.py", *shlex.split(arguments))
    for name in ("copying", "base", "warmup", "cold_start", "grpo"):
        stage(plan["commands"][name], ranks=2)
    found: dict[str, str] = plan["commands"]
    return found


def asked(given: dict[str, str], policy: Path, way: str) -> dict[str, Any]:
    name = f"{policy.name}_{way.replace(' ', '_')}"
    measured = without(without(given["grpo_eval"], "init_from"), "output_dir")
    found = evaluation(OUT / "bench" / name, f"{measured} {WAYS[way]} init_from={policy}")
    row = {key.split("/")[1]: None if found[key] is None else round(found[key], 3) for key in KEYS}
    return {"policy": policy.name, "asked": way, **row, "by_domain": found["by_domain"]}


@benchmark
def tool_use() -> dict[str, Any]:
    """Reasoning kept across calls against dropped, tools against none (about 10 minutes beside the demo's)."""
    given, rows = made(), []
    for policy in (OUT / "cold_start", OUT / "grpo"):
        rows += [asked(given, policy, way) for way in WAYS]
        print(*rows[-3:], sep="\n", flush=True)
    folder = OUT / "bench" / "grpo_under_drop"
    trained = without(without(given["grpo"], "output_dir"), "rl.eval_every")
    stage(f"{trained} rl.tools.reasoning=drop output_dir={folder}", ranks=2)
    rows.append(asked(given, folder, "drop"))
    print(rows[-1], flush=True)
    by = {(row["policy"], row["asked"]): row["accuracy"] for row in rows}
    passed = by["grpo", "v3_2"] - by["grpo", "without tools"] >= 0.3
    return {"config": {"ways": WAYS, "grpo": given["grpo"]}, "rows": rows, "passed": passed}
