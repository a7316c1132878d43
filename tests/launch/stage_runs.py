"""A tiny run of every stage, one after another, for tests that need what real runs leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conf.schema import STAGES

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "data.source=synthetic data.tokenizer=bytes data.seq_len=64 data.tasks=arithmetic:1,words:1 train.steps=2"
    " train.log_every=1 train.save_every=2 train.eval_sequences=1 rl.prompts_per_step=4 rl.group_size=4"
    " rl.max_new_tokens=8 rl.pack_len=128 rl.beta=0.1 rl.eval_every=1 rl.eval_prompts=2 rl.tasks=arithmetic:1,words:1"
).split()
MODEL = ["model.vocab_size=256", "model.hidden_size=64", "model.num_hidden_layers=2", "model.index_topk=16"]
CODE = """
import os, sys
from launch.stage import main
from tests.distributed.helper import import_deepspeed
import rl.evaluate, rl.loop, train.loop, transformers
import_deepspeed()  # once, before the forks; it cannot be set up twice in a process
for line in sys.argv[1:]:
    child = os.fork()
    if not child:
        status = main(line.split())
        sys.stdout.flush()
        os._exit(status)
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
"""


def run_stages(root: Path, tracker: str = "none") -> dict[str, Path]:
    """Runs all stages below `root` from one process -> the folder of each."""
    lines, before = [], ""
    for stage in STAGES:
        start = [f"init_from={before}"] if before else MODEL
        lines.append(" ".join([f"+stage={stage}", f"output_dir={root / stage}", f"tracker={tracker}", *start, *SMALL]))
        before = str(root / stage)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environ |= {"PYTHONPATH": str(ROOT), "HOME": str(root), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", CODE, *lines], env=environ, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    return {stage: root / stage for stage in STAGES}
