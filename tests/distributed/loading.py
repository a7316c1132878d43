"""What a rank reads and holds while it loads a model, measured: `python -m tests.distributed.loading FOLDER` prints it.

The ranks are forked from a process that has done nothing else: a large heap, as a long test run has, hides and adds
memory.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from conf.schema import ModelConfig, OptimConfig, ParallelConfig
from model import Transformer
from model.hf import load_weights
from model.hf_files import Checkpoint
from tests.distributed.helper import run_ranks
from tests.train import tiny
from train.parallel.ep import ExpertParallel
from train.parallel.zero3 import Zero3, held

M_MMAP_THRESHOLD = -3  # malloc.h
WORLD = 4
MODEL: ModelConfig = replace(
    tiny.MODEL,
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1024,
    moe_intermediate_size=512,
    num_hidden_layers=4,
    n_routed_experts=8,
    q_lora_rank=256,
    kv_lora_rank=128,
    num_attention_heads=8,
)


def status(key: str) -> int:
    """Bytes of this process's VmRSS (now) or VmHWM (the most since it was reset)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def load(folder: str | None, parallel: ParallelConfig) -> dict[str, Any]:
    """Loads on this rank -> bytes that it held at most beyond the start, values read, values kept and their sum."""
    read = [0]
    rows = Checkpoint._rows

    def counted(self: Checkpoint, *args: Any) -> torch.Tensor:
        found = rows(self, *args)
        read[0] += found.numel()
        return found

    Checkpoint._rows = counted  # type: ignore[method-assign]  (this process alone)
    with torch.device("meta"):
        net = Transformer(MODEL)
    ExpertParallel(parallel.ep).cut(net)
    share = Zero3(OptimConfig(), parallel) if parallel.zero == 3 else None
    # a fork maps the pages of code at their first use, which must not count as the model's memory
    touched = Transformer(tiny.MODEL)
    touched.init_weights(0, Zero3(OptimConfig(), parallel) if parallel.zero == 3 else None)
    if folder is not None:
        Checkpoint(folder).read("model.norm.weight")
        read[0] = 0
    gc.collect()
    libc = ctypes.CDLL("libc.so.6")
    # from 32 MB on, as all large tensors of real models have, memory is mapped and goes back at once; ours shall too,
    # or the holes that they leave in the heap count
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 18)
    libc.malloc_trim(0)  # free memory that came with the fork would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    if folder is None:
        net.init_weights(0, share)
    else:
        load_weights(net, folder, share=share)
    parts = [held(p) for p in net.parameters()]
    return {
        "bytes": status("VmHWM") - before,
        "read": read[0],
        "kept": sum(part.numel() for part in parts),
        "sum": sum(float(part.double().sum()) for part in parts),
    }


def main(folder: str) -> None:
    cases = {
        f"{source}-ep{ep}": run_ranks(load, WORLD, folder if source == "checkpoint" else None, ParallelConfig(3, ep))
        for source in ("checkpoint", "nothing")
        for ep in (1, 2)
    }
    cases["whole"] = run_ranks(load, 2, folder, ParallelConfig(1))
    print(json.dumps(cases))


if __name__ == "__main__":
    main(sys.argv[1])
