"""What travels between ranks in a whole step, counted on the collectives, equals train/communication.py.

Counted are the bytes of the larger buffer of a call: what an all-gather gives, what a reduce-scatter takes. The
formulas see the configuration and the routers' choices alone. `small` are scalars and the step's sums, in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train.engine
from bench.plan import AGAIN, traffic_row
from bench.plan_communication import Bytes, rows_of
from conf.schema import OptimConfig, ParallelConfig, RunConfig
from model.context import documents
from tests.distributed.helper import run_ranks
from tests.train import tiny
from train.communication import by_collective, flows, scalar_bytes
from train.job import Job
from train.loop import run_step
from train.memory_model import WINDOW
from train.optim import build_optimizer, select_trainable
from train.parallel.cp import ContextParallel
from train.parallel.ep import ExpertParallel
from train.stages import STAGES

T, FP32 = 16, 4
MODEL = tiny.MODEL
LAYERS = MODEL.num_hidden_layers + MODEL.num_mtp_layers
EXPERTS, CHOICES = MODEL.n_routed_experts, MODEL.num_experts_per_tok
LATENT, KEY = MODEL.kv_lora_rank + MODEL.qk_rope_head_dim, MODEL.index_head_dim


@dataclass(frozen=True)
class Cell:
    """One step of a stage in one layout."""

    stage: str
    world: int
    zero: int
    ep: int = 1
    cp: int = 1
    micro_batches: int = 1
    checkpointing: bool = False
    window: bool = True  # False: ZeRO-3 keeps no parameters between two uses, as it must where layers are large
    persist_below: int = 0
    precision: str = "fp32"

    def __str__(self) -> str:
        words = [self.stage, f"{self.world}ranks", f"zero{self.zero}", f"ep{self.ep}", f"cp{self.cp}"]
        words += [f"x{self.micro_batches}", "checkpointing" if self.checkpointing else ""]
        words += ["" if self.window else "no_window", f"persist{self.persist_below}" if self.persist_below else ""]
        words += ["" if self.precision == "fp32" else self.precision]
        return "-".join(word for word in words if word)


def take_step(cell: Cell) -> tuple[dict[str, int], torch.Tensor]:
    """(bytes by collective of a step, experts that the router of each MoE layer chose for the rank's rows in each
    micro-batch, [MoE layers, micro-batches, R, K]). Before it ZeRO-3 learns the order of the modules in one step and
    compares it over the ranks in another."""
    stage, net, optim = STAGES[cell.stage], tiny.build(), OptimConfig(lr=1e-3)
    cp, ep = ContextParallel(cell.cp), ExpertParallel(cell.ep)
    ep.cut(net)
    net.activation_checkpointing = cell.checkpointing
    select_trainable(net, stage)
    if not cell.window:
        keep_nothing()
    parallel = ParallelConfig(cell.zero, cell.ep, cell.cp, cell.persist_below)
    engine = train.engine.Engine(net, build_optimizer(net, optim), optim, parallel, cell.precision)
    context: Any = SimpleNamespace(stage=stage, config=RunConfig(cell.stage, "", model=MODEL), cp=cp, stop_asked=False)
    first = cp.replica * cell.micro_batches
    batches = [tiny.batch(first + j, T) for j in range(cell.micro_batches)]

    def step() -> None:
        run_step(context, engine, batches, stats=True)
        engine.step({"trunk": 1e-3, "indexer": 1e-3})

    for _ in range(2 if cell.zero == 3 else 0):
        step()
    chosen: list[list[torch.Tensor]] = [[] for _ in net.routers()]
    for router, calls in zip(net.routers(), chosen, strict=True):
        router.register_forward_hook(lambda _, __, routing, calls=calls: calls.append(routing.experts))
    with Bytes() as counter:
        step()
    again = 2 if cell.checkpointing and stage.trains_trunk else 1  # forwards of a layer
    return dict(counter.found), torch.stack([torch.stack(calls[::again]) for calls in chosen])


def keep_nothing() -> None:
    real = train.engine.ds_config

    def config(*args: Any) -> dict[str, Any]:
        found = real(*args)
        window = ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
        found["zero_optimization"] |= {f"stage3_{name}": 0 for name in window}
        return found

    train.engine.ds_config = config


def wanted(cell: Cell, choices: list[torch.Tensor], rank: int) -> dict[str, int]:
    parallel = ParallelConfig(cell.zero, cell.ep, cell.cp, cell.persist_below)
    stage = STAGES[cell.stage]
    job = Job(MODEL, stage, parallel, cell.world, T, cell.precision, cell.micro_batches, cell.checkpointing)
    first = rank // cell.cp * cell.micro_batches
    batches = [tiny.batch(first + j, T) for j in range(cell.micro_batches)]
    num_documents = sum(len(documents(batch["doc_start"])[1]) for batch in batches)
    window = WINDOW if cell.window else 0
    found = by_collective(flows(job, num_documents, rows_of(job, choices, rank), window))
    return found | {"small all-reduce": scalar_bytes(job, statistics=True)}


CELLS = [
    *(Cell(stage, 2, zero) for stage in ("pretrain", "dense_warmup", "sparse_adapt") for zero in (0, 1, 2, 3)),
    Cell("sparse_adapt", 2, 1, ep=2),
    Cell("sparse_adapt", 2, 3, ep=2),
    Cell("sparse_adapt", 2, 2, ep=2, cp=2),
    Cell("sparse_adapt", 2, 3, ep=2, cp=2),
    Cell("dense_warmup", 2, 1, ep=2, cp=2),
    Cell("dense_warmup", 2, 3, ep=2, cp=2),
    Cell("sparse_adapt", 4, 2, ep=2, cp=2),  # every expert on two ranks
    Cell("sparse_adapt", 4, 3, ep=2, cp=2),
    Cell("sparse_adapt", 2, 0, micro_batches=2),
    Cell("sparse_adapt", 4, 1, ep=2, micro_batches=2),
    Cell("sparse_adapt", 2, 2, micro_batches=2),
    Cell("sparse_adapt", 2, 3, micro_batches=2),
    Cell("sparse_adapt", 3, 1),  # sizes that do not divide
    Cell("sparse_adapt", 3, 3),
    Cell("sparse_adapt", 2, 1, ep=2, cp=2, checkpointing=True),
    Cell("pretrain", 2, 3, window=False),
    Cell("dense_warmup", 2, 3, window=False, checkpointing=True),
    Cell("sparse_adapt", 2, 3, window=False),
    Cell("sparse_adapt", 2, 3, ep=2, cp=2, micro_batches=2, window=False, checkpointing=True),
    Cell("sparse_adapt", 2, 3, micro_batches=2, window=False, persist_below=1000),
    Cell("sparse_adapt", 2, 3, ep=2, cp=2, precision="bf16"),
]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_step_moves_the_bytes_of_the_formulas(cell: Cell) -> None:
    answers = run_ranks(take_step, cell.world, cell)
    choices = [chosen for _, chosen in answers]
    for rank, (found, _) in enumerate(answers):
        assert found == wanted(cell, choices, rank), rank


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (2, ("+stage=sparse_adapt", "parallel.pp=2", "train.micro_batches=3")),
        (4, ("+stage=sparse_adapt", "parallel.pp=2", "parallel.ep=2", "train.micro_batches=2")),
        (4, ("+stage=pretrain", "parallel.pp=2", "parallel.cp=2", "train.micro_batches=2", *AGAIN)),
    ],
)
def test_floors_move_the_bytes_of_the_formulas(world: int, settings: tuple[str, ...]) -> None:
    row = traffic_row(world, settings)
    assert row["equal"] and row["counted"]["send"] > 0


@pytest.mark.parametrize("cp", [2, 4])
def test_context_parallelism_moves_latents_and_index_keys_alone(cp: int) -> None:
    """ZeRO 0 gathers and scatters nothing itself."""
    latents, keys = LAYERS * T * LATENT * FP32, LAYERS * T * KEY * FP32
    for stage, back in (("sparse_adapt", latents + keys), ("dense_warmup", keys)):  # a frozen trunk takes no gradient
        for found, _ in run_ranks(take_step, cp, Cell(stage, cp, 0, cp=cp)):
            assert (found["all-gather"], found["reduce-scatter"]) == (latents + keys, back)
            assert "all-to-all" not in found
