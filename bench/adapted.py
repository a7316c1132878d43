"""The sparse-adapted base that the benchmarks of RL start from: the demo's, made once under `runs/bench`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from launch.demo import FULL, ROOT, commands, domains

__all__ = ["OUT", "ROOT", "adapted", "domains_of_demo", "stage"]

OUT = ROOT / "runs" / "bench"
domains_of_demo = domains(FULL)


def stage(arguments: str, ranks: int = 1, module: tuple[str, ...] = ("launch/stage.py",)) -> None:
    """Runs one stage quietly, on one core a rank; a run that is finished is not run again."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, *module, *arguments_of(arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def arguments_of(text: str) -> list[str]:
    import shlex

    return shlex.split(text)


def adapted() -> Path:
    """Base, warm-up and adaptation on two ranks (10 minutes on two cores); the folder of the last."""
    for name, arguments in commands(FULL, OUT):
        if name in ("base", "warmup", "adapted"):
            stage(f"{arguments} tracker=none", ranks=2)
    return OUT / "adapted"
