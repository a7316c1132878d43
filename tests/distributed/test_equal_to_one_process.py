"""The engine's gradient is exact: any layout of ranks, micro-batches and ZeRO stages equals one plain process.

AdamW and clipping alone would hide a wrong scale of the gradient, so plain SGD runs as well.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from conf.schema import OptimConfig, ParallelConfig, TrainConfig
from tests.distributed.helper import run_ranks
from tests.train import tiny
from train.engine import Engine
from train.losses import Counts, global_counts, micro_batch_loss
from train.optim import build_optimizer, parameter_groups, select_trainable
from train.stages import STAGES

STEPS, SEQUENCES = 3, 4
# fp32 sums in another order: at most a few ulp a step on values of order 1
TOLERANCE = 3e-6
RATES = {"trunk": 3e-2, "indexer": 5e-2}


def optim_config(kind: str) -> OptimConfig:
    # eps well above the rounding of tiny gradients, whose sign AdamW would otherwise blow up to a whole step
    return OptimConfig(lr=1.0, eps=1e-4, clip=0.0 if kind == "sgd" else 0.05)


def make_optimizer(net: torch.nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(parameter_groups(net, 0.0), lr=1.0)
    return build_optimizer(net, optim_config(kind))


def reference(stage_name: str, kind: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Plain torch: all sequences of a step in one process, one backward over the summed loss."""
    stage, net = STAGES[stage_name], tiny.build()
    select_trainable(net, stage)
    optimizer = make_optimizer(net, kind)
    losses = []
    for step in range(STEPS):
        batches = [tiny.batch(step * SEQUENCES + i) for i in range(SEQUENCES)]
        counts = Counts(
            sum(int((b["labels"] >= 0).sum()) for b in batches),
            sum(int((b["mtp_labels"] >= 0).sum()) for b in batches),
            sum(int((b["doc_start"] <= torch.arange(16)).sum()) for b in batches),
            SEQUENCES,
        )
        kwargs = {"attention": stage.attention, "indexer_loss": stage.indexer_loss}
        outs = [net(**b, **kwargs, lm_loss=stage.lm_loss, trunk_grad=stage.trunk_grad) for b in batches]
        loss = torch.stack([micro_batch_loss(out, counts, stage, TrainConfig())[0] for out in outs]).sum()
        optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        if kind != "sgd":
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        for group in optimizer.param_groups:
            group["lr"] = RATES[group["role"]]
        optimizer.step()
    return net.state_dict(), losses


def train(stage_name: str, kind: str, zero: int) -> tuple[dict, list[float]]:
    stage, net = STAGES[stage_name], tiny.build()
    select_trainable(net, stage)
    engine = Engine(net, make_optimizer(net, kind), optim_config(kind), ParallelConfig(zero=zero))
    local = SEQUENCES // dist.get_world_size()
    losses = []
    for step in range(STEPS):
        first = step * SEQUENCES + dist.get_rank() * local
        batches = [tiny.batch(first + j) for j in range(local)]
        counts, total = global_counts(batches), torch.zeros(())
        for j, fields in enumerate(batches):
            out = engine.forward(
                **fields,
                attention=stage.attention,
                indexer_loss=stage.indexer_loss,
                lm_loss=stage.lm_loss,
                trunk_grad=stage.trunk_grad,
            )
            loss, _ = micro_batch_loss(out, counts, stage, TrainConfig())
            total += loss.detach()
            engine.backward(loss, last=j == local - 1)
        dist.all_reduce(total)
        losses.append(float(total))
        engine.step(RATES)
    return {name: value.clone() for name, value in net.state_dict().items()}, losses


@pytest.mark.parametrize(("world", "zero"), [(1, 1), (2, 0), (2, 1), (2, 2)])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("stage", ["pretrain", "dense_warmup", "sparse_adapt"])
def test_ranks_and_micro_batches_equal_one_plain_process(stage: str, kind: str, world: int, zero: int) -> None:
    wanted, wanted_losses = reference(stage, kind)
    for state, losses in run_ranks(train, world, stage, kind, zero):
        assert losses == pytest.approx(wanted_losses, rel=1e-5)
        for name, value in wanted.items():
            assert (state[name] - value).abs().max() <= TOLERANCE, name
