"""A checkpointed forward under bf16 holds no narrow copy of a weight when it ends: autocast's own cache would keep all
of them till then."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.plan_memory import Training
from conf.schema import DataConfig, ParallelConfig, PrecisionConfig, RunConfig, TrainConfig
from tests.distributed.helper import run_ranks
from tests.train import tiny


class Narrowed(TorchDispatchMode):
    """Weak references to the bf16 copies of what has the shape of a weight."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.shapes = {p.shape for p in net.parameters() if p.dim() > 1}
        self.made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16 and out.shape in self.shapes:
            self.made.append(weakref.ref(out))
        return out


def copies(config: RunConfig) -> tuple[int, int]:
    """(copies made, copies there) when this rank's first forward ends, still within autocast."""
    training = Training(config)
    found: list[tuple[int, int]] = []
    narrowed = Narrowed(training.net)
    training.net.register_forward_hook(
        lambda *_: found.append((len(narrowed.made), sum(copy() is not None for copy in narrowed.made)))
    )
    with narrowed:
        training.step()
    return found[0]


@pytest.mark.parametrize("pp", [1, 2])
def test_a_checkpointed_forward_keeps_none(pp: int) -> None:
    length = 40  # rows that no weight has
    config = RunConfig(
        "pretrain",
        "",
        model=replace(tiny.MODEL, mtp="drop"),  # its eh_proj is not checkpointed
        data=DataConfig(seq_len=length),
        train=TrainConfig(micro_batches=2, activation_checkpointing=True),
        parallel=ParallelConfig(pp=pp),
        precision=PrecisionConfig("bf16"),
    )
    for made, there in run_ranks(copies, 2, config):
        assert made >= 8 and there == 0
