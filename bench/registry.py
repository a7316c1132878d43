"""The one list of benchmarks, and what every result carries: commit, hardware, versions, configuration.

A benchmark is a function from nothing to a JSON-able dict with the keys `config`, `rows` and `passed` (bool).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
BENCHMARKS: dict[str, Callable[[], dict[str, Any]]] = {}


def benchmark(function: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Registers a benchmark under its function's name."""
    BENCHMARKS[function.__name__] = function
    return function


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def provenance() -> dict[str, Any]:
    """Where and with what a result was measured."""
    commit = os.environ.get("WINNOW_COMMIT", "")  # where the code was copied without its history
    if not commit and shutil.which("git"):
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent, check=False).stdout.strip()
    return {
        "date": date.today().isoformat(),
        "commit": commit or "unknown",
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{_cpu_name()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": f"python -m bench {' '.join(sys.argv[1:])}".strip(),
    }


def run(name: str) -> bool:
    """Runs one benchmark, writes its JSON, says whether it kept its promise."""
    result = {"name": name, **provenance(), **BENCHMARKS[name]()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{name}: {'passed' if result['passed'] else 'FAILED'}, written to {RESULTS / f'{name}.json'}")
    return bool(result["passed"])
