"""Under ZeRO-3 a rank reads and holds its share of a model while it loads, never the whole."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.schema import ModelConfig, OptimConfig, ParallelConfig
from model import Transformer, from_pretrained, save_pretrained
from model.hf import load_weights
from model.hf_files import Checkpoint
from tests.distributed.helper import run_ranks
from tests.train import tiny
from train.parallel.ep import ExpertParallel
from train.parallel.zero3 import Zero3, held

M_MMAP_THRESHOLD = -3  # malloc.h
WORLD, SLACK = 4, 1.3  # the bound: the share x 1.3 and the largest tensor
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Transformer]:
    net = Transformer(MODEL)
    net.init_weights(0)
    folder = tmp_path_factory.mktemp("large") / "hf"
    save_pretrained(net, folder, torch.bfloat16)
    return str(folder), from_pretrained(folder)


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("source", ["checkpoint", "nothing"])
def test_a_rank_holds_its_share_and_one_tensor(source: str, ep: int, saved: tuple[str, Transformer]) -> None:
    folder, net = saved
    values = sum(p.numel() for p in net.parameters())
    largest = 4 * max(p.numel() for p in net.parameters())
    found = run_ranks(load, WORLD, folder if source == "checkpoint" else None, ParallelConfig(zero=3, ep=ep))
    for each in found:
        assert each["kept"] == pytest.approx(values / WORLD, rel=0.01)
        assert each["bytes"] <= SLACK * 4 * values / WORLD + largest, each
    if source == "checkpoint":
        # whole rows are read: at most two of a tensor are not the rank's alone
        assert values <= sum(each["read"] for each in found) <= 1.02 * values
        total = sum(float(p.detach().double().sum()) for p in net.parameters())
        assert sum(each["sum"] for each in found) == pytest.approx(total, rel=1e-9, abs=1e-3)


def test_without_zero_3_every_rank_holds_the_whole(saved: tuple[str, Transformer]) -> None:
    """What the bound above would not let pass."""
    folder, net = saved
    whole = 4 * sum(p.numel() for p in net.parameters())
    (found, _) = run_ranks(load, 2, folder, ParallelConfig(zero=1))
    assert found["bytes"] >= 0.9 * whole
