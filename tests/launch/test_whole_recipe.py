"""conf/recipes/whole_tiny.yaml with real stages: every gate holds in the end, one gave warm-up more steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_whole_way_through_its_gates(tmp_path: Path) -> None:
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "tests/launch/forked.py"), "whole_tiny", "--dir", str(tmp_path)]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    stages = json.loads((tmp_path / "pipeline.json").read_text())["stages"]
    assert {entry["status"] for entry in stages.values()} == {"done"} and len(stages) == 5
    for said in ("gate settled of warmup", "gate at_least of warmup", "gate parity of adapted_eval"):
        assert said in done.stdout
    warmup = [json.loads(line)["step"] for line in (tmp_path / "warmup" / "metrics.jsonl").read_text().splitlines()]
    grown = stages["warmup"]["steps"]
    assert 20 < grown <= 100 and warmup == list(range(1, grown + 1)), "one run in one folder, each step once"
    assert (tmp_path / "rl" / "hf" / "config.json").is_file()
