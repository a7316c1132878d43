"""Peak memory of a training process, measured rank by rank: what `python -m bench plan` holds the planner against.

A rank is forked from a process that has imported everything. It first takes a step of a model of a few thousand values
(what libraries allocate on first use), gives freed memory back, and resets the kernel's high-water mark; the measured
peak is the mark after two steps of the real model less what was resident then: the baseline of an empty process.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from conf.schema import ModelConfig, RunConfig
from model import Transformer
from train import distributed
from train.engine_base import EngineBase
from train.loop import make_engine, run_step
from train.optim import build_optimizer, select_trainable
from train.parallel.cp import ContextParallel
from train.parallel.ep import ExpertParallel
from train.parallel.pp import PipelineParallel
from train.parallel.zero3 import Zero3
from train.stages import STAGES, resolve_rates
from train.start import op_settings

MINIMAL = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    n_routed_experts=4, num_experts_per_tok=2, index_n_heads=4, index_head_dim=16, index_topk=4,
)  # fmt: skip
PHASES = ("forward", "backward", "run", "step")  # methods of an engine; in depth `run` is both of the first
M_MMAP_THRESHOLD = -3  # malloc.h
CLEAR = Path("/proc/self/clear_refs")  # a 5 written to it resets VmHWM
STEPS = 2  # the first makes AdamW's moments, and ZeRO-3 learns the order of the modules in it


def resident(key: str = "VmRSS") -> int:
    """Bytes of this process: VmRSS (now) or VmHWM (the most since it was reset)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"peak memory is read from /proc/self/status, which has no {key} here: run this on Linux")


def random_batch(model: ModelConfig, length: int, seed: int) -> dict[str, Tensor]:
    """One document of random tokens."""
    ids = torch.randint(0, model.vocab_size, (length + 2,), generator=torch.Generator().manual_seed(seed))
    return {
        "input_ids": ids[:-2].clone(),
        "next_ids": ids[1:-1].clone(),
        "labels": ids[1:-1].clone(),
        "mtp_labels": ids[2:].clone(),
        "positions": torch.arange(length),
        "doc_start": torch.zeros(length, dtype=torch.int64),
    }


class Training:
    """What launch/stage.py puts together around a step, with random tokens in place of a corpus."""

    def __init__(self, config: RunConfig) -> None:
        stage = STAGES[config.stage]
        optim = resolve_rates(stage, config.optim, config.model.hidden_size)
        parallel = config.parallel
        pp = PipelineParallel(parallel.pp, parallel.pp_schedule, config.model)
        self.cp, ep = ContextParallel(parallel.cp, parallel.pp), ExpertParallel(parallel.ep, parallel.pp)
        with torch.device("meta"):
            net = Transformer(config.model)
        pp.cut(net)
        ep.cut(net)
        net.init_weights(0, Zero3(optim, parallel) if parallel.zero == 3 else None)
        net.activation_checkpointing = config.train.activation_checkpointing
        net.use(op_settings(config, distributed.device()))
        select_trainable(net, stage)
        optimizer = build_optimizer(net, optim, fused=parallel.offload != "none")
        self.net = net
        self.engine = make_engine(net, optimizer, replace(config, optim=optim), pp, ep)
        self.context: Any = SimpleNamespace(stage=stage, config=config, cp=self.cp, stop_asked=False)

    def step(self) -> None:
        config = self.context.config
        first = self.cp.replica * config.train.micro_batches
        batches = [
            random_batch(config.model, config.data.seq_len, first + j) for j in range(config.train.micro_batches)
        ]
        run_step(self.context, self.engine, batches, stats=False)
        self.engine.step({"trunk": 1e-4, "indexer": 1e-4})

    def close(self) -> None:
        """Lets everything of the model go."""
        for phase in PHASES:
            vars(self.engine).pop(phase, None)
        self.engine.close()
        for p in self.net.parameters():
            p.grad, p.data = None, torch.empty(0)
        vars(self).clear()
        gc.collect()


class Marks:
    """The high-water mark of each phase: forward, backward (with what reduces gradients), step; in depth run, step."""

    def __init__(self, engine: EngineBase, baseline: int) -> None:
        self.baseline, self.found = baseline, {phase: 0 for phase in PHASES if hasattr(engine, phase)}
        for phase in self.found:
            setattr(engine, phase, self._marked(phase, getattr(engine, phase)))

    def _marked(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: Any, **kwargs: Any) -> Any:
            CLEAR.write_text("5")
            answer = call(*args, **kwargs)
            self.found[phase] = max(self.found[phase], resident("VmHWM") - self.baseline)
            return answer

        return marked


def peak(config: RunConfig, mapped: bool = True) -> dict[str, int]:
    """On this rank: bytes of the empty process, and the most that each phase of two steps added to it.

    mapped: every tensor of 128 KiB or more gets pages of its own, which the kernel has back when it is freed; false is
    glibc's default, which keeps freed memory in holes.
    """
    libc = ctypes.CDLL("libc.so.6")
    if mapped:
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 17)
    small = replace(
        config,
        model=replace(MINIMAL, num_hidden_layers=max(2, config.parallel.pp)),
        data=replace(config.data, seq_len=8 * config.parallel.cp),
        parallel=replace(config.parallel, ep=min(config.parallel.ep, 2)),
    )
    warm = Training(small)
    warm.step()
    warm.close()
    libc.malloc_trim(0)
    baseline = resident()
    training = Training(config)
    marks = Marks(training.engine, baseline)
    for _ in range(STEPS):
        training.step()
    training.close()
    libc.malloc_trim(0)
    return {"baseline": baseline, "left": resident() - baseline, **marks.found}
