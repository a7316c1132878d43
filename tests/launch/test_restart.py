"""A killed rank under `torchrun --max-restarts`: the job starts itself again and goes on from its checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS = 16


def worker(launcher: int, rank: int) -> int | None:
    """Process id of a rank that `launcher` started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    return None


def test_a_killed_rank_is_started_again_and_the_run_ends_whole(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"),
        *("launch/stage.py", "+stage=pretrain", f"output_dir={run}", f"train.steps={STEPS}", "train.save_every=2"),
        *("train.log_every=1", "data.source=synthetic", "data.tokenizer=bytes", "data.seq_len=64", "tracker=none"),
        *("model.num_hidden_layers=2", "train.threads=1"),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as job:
        deadline = time.monotonic() + 90
        while not (run / "checkpoints/step_2").exists():
            assert time.monotonic() < deadline and job.poll() is None, job.stdout.read() if job.stdout else ""
            time.sleep(0.02)
        killed = worker(job.pid, 1)
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        output = job.communicate(timeout=90)[0].decode()
    assert job.returncode == 0, output
    assert "going on from" in output
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert (run / "hf/config.json").is_file() and not (run / "error.txt").exists()
