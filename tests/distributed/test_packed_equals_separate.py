"""The same documents give the same step however they are laid out: each in a sequence of its own on one plain process,
or packed into 1, 2 or 4 micro-batches a rank, with slices that cut through them.

What stands for itself is compared (sums of every loss, tokens of every expert), and the gradients of all of it. In the
balance loss a packed sequence weighs its documents by their rows, so the reference does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import OptimConfig, ParallelConfig, RunConfig, TrainConfig
from data.packing import pack
from model.context import documents
from tests.distributed.helper import run_ranks
from tests.train import tiny
from train.engine import Engine
from train.loop import run_step
from train.losses import Counts, Sums, add_sums, micro_batch_loss
from train.optim import build_optimizer, select_trainable
from train.parallel.cp import ContextParallel, zigzag
from train.parallel.ep import ExpertParallel
from train.stages import STAGES

LENGTHS = (7, 9, 4, 12, 11, 5, 3, 13)
TRAIN = TrainConfig(mtp_weight=0.3, balance_weight=1.0)  # no term is small beside the others
TOLERANCE = 1e-5  # relative
Document = list[int]


def draw() -> list[Document]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(tiny.MODEL.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]


@dataclass
class Found:
    loss: float
    sums: Sums
    grad_norm: float
    gradients: dict[str, Tensor]


def separate(stage_name: str, sequences: list[list[Document]]) -> Found:
    """Each document alone in its sequence; `sequences` says which ones share one in the run that is checked."""
    stage, net, total = STAGES[stage_name], tiny.build(), Sums()
    select_trainable(net, stage)
    lengths = [len(document) for sequence in sequences for document in sequence]
    targets, second = sum(n - 1 for n in lengths), sum(n - 2 for n in lengths)
    counts = Counts(targets, second, sum(lengths), len(sequences))
    for sequence in sequences:
        for document in sequence:
            (alone,) = pack([document], len(document))
            out = net(
                **alone.tensors(),
                attention=stage.attention,
                indexer_loss=stage.indexer_loss,
                lm_loss=stage.lm_loss,
                trunk_grad=stage.trunk_grad,
                stats=True,
            )
            out = replace(out, balance=out.balance * len(document) / sum(len(other) for other in sequence))
            loss, sums = micro_batch_loss(out, counts, stage, TRAIN)
            loss.backward()
            add_sums(total, sums)
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    return Found(float(total["loss"]), total, float(norm), gradients)


def packed(stage_name: str, parallel: ParallelConfig, sequences: list[list[Document]], length: int) -> Found:
    from deepspeed.utils import safe_get_full_grad

    stage, net, optim = STAGES[stage_name], tiny.build(), OptimConfig(lr=1e-3)
    cp, ep = ContextParallel(parallel.cp), ExpertParallel(parallel.ep)
    ep.cut(net)
    select_trainable(net, stage)
    engine = Engine(net, build_optimizer(net, optim), optim, parallel)
    config = RunConfig(stage_name, "", model=tiny.MODEL, train=TRAIN)
    context: Any = SimpleNamespace(stage=stage, config=config, cp=cp, stop_asked=False)
    local = len(sequences) // cp.replicas
    batches = [pack(sequence, length) for sequence in sequences[cp.replica * local :][:local]]
    step = run_step(context, engine, [batch.tensors() for (batch,) in batches], stats=True)
    gradients = {n: safe_get_full_grad(p).clone() for n, p in net.named_parameters() if p.requires_grad}
    return Found(step.loss, step.sums, step.grad_norm, gradients)


def straddling(sequence: list[Document], length: int, cp: int) -> int:
    """Documents of which several ranks hold a part."""
    document, _ = documents(pack(sequence, length)[0].doc_start)
    held = [set(document[zigzag(length, cp, rank)].tolist()) for rank in range(cp)]
    return sum(sum(i in rows for rows in held) > 1 for i in range(len(sequence)))


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (1, ParallelConfig(zero=1)),
        (2, ParallelConfig(zero=2)),
        (2, ParallelConfig(zero=1, cp=2)),
        (2, ParallelConfig(zero=2, ep=2)),
        (2, ParallelConfig(zero=3, ep=2, cp=2, persist_below=0)),
    ],
    ids=("1rank", "2ranks", "cp", "ep", "zero3-ep-cp"),
)
@pytest.mark.parametrize("stage", ["dense_warmup", "sparse_adapt"])
def test_packed_documents_equal_each_alone(stage: str, world: int, parallel: ParallelConfig, accumulation: int) -> None:
    every = draw()
    count = accumulation * world // parallel.cp
    each = len(every) // count
    sequences = [every[i : i + each] for i in range(0, len(every), each)]
    longest = max(sum(len(document) for document in sequence) for sequence in sequences)
    length = -(-(longest + 1) // 4) * 4  # always some padding
    if parallel.cp > 1:
        assert all(straddling(sequence, length, parallel.cp) for sequence in sequences)
    wanted = separate(stage, sequences)
    for rank, found in enumerate(run_ranks(packed, world, stage, parallel, sequences, length)):
        assert found.loss == pytest.approx(wanted.loss, rel=TOLERANCE)
        assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=TOLERANCE)
        assert found.sums.keys() - {"stop"} == wanted.sums.keys()
        for name, value in wanted.sums.items():
            torch.testing.assert_close(found.sums[name], value, rtol=TOLERANCE, atol=0, msg=lambda m, n=name: n + m)
        assert found.gradients.keys() == wanted.gradients.keys()
        for name, value in wanted.gradients.items():
            mine = value.chunk(parallel.ep)[rank % parallel.ep] if ".experts." in name else value
            assert float((found.gradients[name] - mine).norm()) <= TOLERANCE * float(mine.norm()), name
