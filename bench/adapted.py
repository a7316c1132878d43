"""The sparse-adapted base that the benchmarks of RL start from: the demo's, made once under `runs/bench`, where their
own runs lie as well. What is finished there is not run again: remove the folder to measure anew."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "runs" / "bench"


def run_python(*arguments: str) -> str:
    """Runs Python on one thread -> its stdout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def stage(arguments: str, ranks: int = 1, program: tuple[str, ...] = ("launch/stage.py",)) -> None:
    """Runs one stage, a core for each rank; one that is finished is not run again."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    run_python(*launcher, *program, *shlex.split(arguments), "tracker=none")


def plan() -> dict[str, Any]:
    """The demo's: `commands` (name -> arguments of launch/stage.py, under OUT), `domains`, `min_righted`."""
    found: dict[str, Any] = json.loads(run_python("launch/demo.py", "--list", "--dir", str(OUT.relative_to(ROOT))))
    return found


def adapted() -> dict[str, Any]:
    """Base, warm-up and adaptation on two ranks (about 8 minutes on two cores) -> the demo's plan."""
    found = plan()
    for name in ("base", "warmup", "adapted"):
        stage(found["commands"][name], ranks=2)
    return found


def without(arguments: str, key: str) -> str:
    """The arguments less a setting."""
    return shlex.join(part for part in shlex.split(arguments) if not part.startswith(f"{key}="))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def evaluation(folder: Path, arguments: str) -> dict[str, Any]:
    """Evaluates into `folder` -> evaluation.json, with the accuracy of each domain under `by_domain`."""
    stage(f"{arguments} train.eval_sequences=2 output_dir={folder}", ranks=2)
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    ends = ("domain/", "/accuracy")
    of = {key: value for key, value in found.items() if key.startswith(ends[0]) and key.endswith(ends[1])}
    return found | {"by_domain": {key.split("/")[1]: round(value, 3) for key, value in of.items()}}
