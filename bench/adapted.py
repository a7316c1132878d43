"""The sparse-adapted base that the benchmarks of RL start from: the demo's, made once under `runs/bench`."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch.demo import FULL, ROOT, accuracy, commands

OUT = ROOT / "runs" / "bench"


def stage(arguments: str, ranks: int = 1, program: tuple[str, ...] = ("launch/stage.py",)) -> None:
    """Runs one stage quietly, a core for each rank; one that is finished is not run again."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, *program, *shlex.split(arguments), "tracker=none"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def adapted() -> Path:
    """Base, warm-up and adaptation on two ranks (about 8 minutes on two cores); the folder of the last."""
    for name, arguments in commands(FULL, OUT):
        if name in ("base", "warmup", "adapted"):
            stage(arguments, ranks=2)
    return OUT / "adapted"


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def evaluation(folder: Path, arguments: str) -> dict[str, Any]:
    """Evaluates into `folder` -> evaluation.json."""
    stage(f"{arguments} train.eval_sequences=2 output_dir={folder}", ranks=2)
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return found


def by_domain(found: dict[str, Any]) -> dict[str, float]:
    """Accuracy of each of the demo's domains."""
    return {domain: round(accuracy(found, domain), 3) for domain in FULL.tasks}
