"""The planner (launch/plan.py) held against what happens: FLOPs, bytes between ranks, peak memory.

FLOPs: train/flops.py, and what plain torch runs beyond it by name, against torch's counter, for every stage. Traffic:
train/communication.py against the collectives of steps on 2 and 4 gloo processes, with the routers' choices known
(equal) and with experts taken as evenly loaded (what a plan can know). Memory: train/memory_model.py against the
high-water mark of training processes, phase by phase; bench/plan_memory.py says how. Everything on a CPU.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from bench.plan_communication import predicted, rows_of, take_step
from bench.plan_flops import EXACT, beyond, count
from bench.plan_memory import PHASES, STEPS, peak, random_batch
from bench.plan_ranks import run_ranks
from bench.registry import benchmark
from conf.load import load
from conf.schema import ModelConfig, RunConfig
from model import Transformer
from train.flops import Row, row_flops
from train.job import Job
from train.memory_model import Memory, predict_floor
from train.stages import STAGES

TOLERANCE = 0.1  # of the measured peak
TINY = ("model.vocab_size=64", "model.num_hidden_layers=3", "model.moe_intermediate_size=90", "model.index_topk=6")
SMALL = (
    "model=small", "model.vocab_size=8192", "model.num_hidden_layers=4", "model.moe_intermediate_size=512",
    "model.n_routed_experts=8", "model.num_experts_per_tok=2", "model.n_group=1", "model.topk_group=1",
    "model.index_n_heads=4",
)  # fmt: skip
FEW = ("model.n_routed_experts=4", "model.vocab_size=2048", "model.moe_intermediate_size=256")  # activations weigh more
AGAIN = ("train.activation_checkpointing=true",)
MEMORY: tuple[tuple[int, tuple[str, ...]], ...] = (  # processes, settings beside SMALL
    (1, ("+stage=pretrain", "parallel.zero=0", "data.seq_len=512")),
    (1, ("+stage=pretrain", "parallel.zero=0", "data.seq_len=1536", *FEW)),
    (1, ("+stage=pretrain", "data.seq_len=1024", *AGAIN, *FEW)),
    (1, ("+stage=pretrain", "data.seq_len=512", "precision=bf16")),
    (1, ("+stage=dense_warmup", "data.seq_len=1024")),
    (1, ("+stage=sparse_adapt", "data.seq_len=512")),
    (1, ("+stage=sparse_adapt", "parallel.zero=0", "data.seq_len=1536", *FEW)),
    (1, ("+stage=sparse_adapt", "parallel.zero=0", "data.seq_len=1024", "precision=bf16", *FEW)),
    (1, ("+stage=pretrain", "parallel.zero=0", "data.seq_len=2048", "precision=bf16", *AGAIN, *FEW)),
    (1, ("+stage=sparse_adapt", "data.seq_len=768", "model.hidden_size=768", *FEW)),
    (1, ("+stage=sft", "data.seq_len=512", "train.micro_batches=2", "model.num_hidden_layers=6", *FEW)),
    (2, ("+stage=pretrain", "parallel.cp=2", "data.seq_len=1024")),
    (2, ("+stage=sparse_adapt", "parallel.zero=2", "data.seq_len=512")),
    (2, ("+stage=sparse_adapt", "parallel.zero=2", "parallel.ep=2", "data.seq_len=512")),
    (2, ("+stage=sparse_adapt", "parallel.zero=3", "data.seq_len=512")),
    (2, ("+stage=sparse_adapt", "parallel.zero=3", "parallel.ep=2", "parallel.cp=2", "data.seq_len=1024")),
    (2, ("+stage=pretrain", "parallel.pp=2", "train.micro_batches=3", "data.seq_len=1024", *FEW)),
    (2, ("+stage=sparse_adapt", "parallel.pp=2", "train.micro_batches=4", "data.seq_len=512", "precision=bf16")),
    (2, ("+stage=dense_warmup", "parallel.pp=2", "train.micro_batches=4", "data.seq_len=1024")),
    (4, ("+stage=sparse_adapt", "parallel.pp=2", "parallel.ep=2", "train.micro_batches=4", "data.seq_len=512")),
    (4, ("+stage=sparse_adapt", "parallel.pp=2", "parallel.cp=2", "train.micro_batches=4", "data.seq_len=1536", *FEW)),
    (4, ("+stage=pretrain", "parallel.pp=4", "train.micro_batches=6", "data.seq_len=1024", *AGAIN, *FEW)),
)
DEFAULT_MALLOC = (5, 12)  # rows of MEMORY that are measured once more as glibc comes
TRAFFIC: tuple[tuple[int, tuple[str, ...]], ...] = (
    *((2, ("+stage=sparse_adapt", f"parallel.zero={zero}")) for zero in (0, 1, 2, 3)),
    *((4, ("+stage=sparse_adapt", f"parallel.zero={zero}")) for zero in (0, 1, 2, 3)),
    (2, ("+stage=sparse_adapt", "parallel.ep=2")),
    (2, ("+stage=sparse_adapt", "parallel.cp=2")),
    (2, ("+stage=dense_warmup", "parallel.cp=2", "parallel.ep=2")),
    (4, ("+stage=sparse_adapt", "parallel.zero=2", "parallel.ep=2", "parallel.cp=2")),
    (4, ("+stage=sparse_adapt", "parallel.zero=3", "parallel.ep=2", "parallel.cp=2")),
    (4, ("+stage=pretrain", "parallel.ep=2", "precision=bf16", "train.micro_batches=2")),
    (2, ("+stage=sparse_adapt", "parallel.pp=2", "train.micro_batches=3")),
    (2, ("+stage=dense_warmup", "parallel.pp=2", "train.micro_batches=2")),
    (4, ("+stage=pretrain", "parallel.pp=2", "train.micro_batches=2", "model.mtp=drop")),
    (4, ("+stage=sparse_adapt", "parallel.pp=2", "parallel.ep=2", "train.micro_batches=4")),
    (4, ("+stage=sparse_adapt", "parallel.pp=2", "parallel.cp=2", "train.micro_batches=3", "precision=bf16")),
)


def job_of(config: RunConfig, world: int) -> Job:
    return Job(
        config.model, STAGES[config.stage], config.parallel, world, config.data.seq_len, config.precision.name,
        config.train.micro_batches, config.train.activation_checkpointing,
    )  # fmt: skip


def flops_rows(model: ModelConfig, length: int = 24) -> list[dict[str, Any]]:
    """Predicted and counted FLOPs of one document, forward alone and with its backward."""
    rows = []
    for name, stage in STAGES.items():
        for backward in (False, True) if stage.runner != "evaluate" else (False,):
            net = Transformer(model)
            net.init_weights(0)
            net.use(EXACT)
            with_mtp = stage.runner == "train"
            forward = {"mtp": False} if not with_mtp else {}
            counted = count(net, name, random_batch(model, length, 0), backward, **forward)
            row = Row((length,), length, length)
            needed = sum(row_flops(model, stage, row, mtp=with_mtp, backward=backward).values())
            extra = sum(beyond(model, name, row, length, backward, with_mtp).values())
            rows.append(
                {"stage": name, "backward": backward, "formula": needed, "beyond": extra, "counted": counted,
                 "equal": needed + extra == counted}
            )  # fmt: skip
    return rows


def traffic_row(world: int, settings: tuple[str, ...]) -> dict[str, Any]:
    """Bytes of a step, summed over ranks: counted, predicted with the routers' choices, and evenly loaded."""
    config = load([*TINY, "data.seq_len=64", *settings]).config
    job, answers = job_of(config, world), run_ranks(take_step, world, config)
    choices = [answer["chosen"] for answer in answers]
    known = [predicted(job, rank, rows_of(job, choices, rank)) for rank in range(world)]
    counted = [answer["counted"] for answer in answers]
    sums: Counter[str] = Counter()
    even: Counter[str] = Counter()
    for rank in range(world):
        sums.update(counted[rank])
        even.update(predicted(job, rank))
    return {
        "ranks": world, "settings": list(settings), "counted": dict(sums), "evenly_loaded": dict(even),
        "equal": counted == known,
    }  # fmt: skip


def memory_row(world: int, settings: tuple[str, ...], mapped: bool = True) -> dict[str, Any]:
    """Predicted and measured bytes of the fullest rank, by phase, and the errors of the floors. What libraries
    have kept when the model is gone is theirs, and taken off; under ZeRO-3 DeepSpeed lets nothing go, and nothing is
    taken off."""
    config = load([*SMALL, *settings]).config
    start = time.monotonic()
    ranks, job = run_ranks(peak, world, config, mapped), job_of(config, world)
    keeps = not mapped or config.parallel.zero == 3
    rows = [_of_rank(rank, predict_floor(job, place // job.ranks), keeps) for place, rank in enumerate(ranks)]
    floors = [rows[first : first + job.ranks] for first in range(0, world, job.ranks)]
    return {
        "ranks": world, "settings": list(settings), **max(rows, key=lambda row: row["peak"]),
        "floors": [max(floor, key=lambda row: row["peak"])["error"] for floor in floors],
        "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip


def _of_rank(rank: dict[str, int], found: Memory, keeps: bool) -> dict[str, Any]:
    theirs = 0 if keeps else rank["left"]
    measured = {phase: rank[phase] - theirs for phase in PHASES if phase in rank}
    most = max(measured.values())
    return {
        "measured": measured, "predicted": found.phases, "kinds": found.kinds, "baseline": rank["baseline"],
        "left": rank["left"], "peak": most, "error": round(found.allocated / most - 1, 4),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The memory rows as Markdown."""
    lines = ["| processes | settings | predicted, MiB | measured, MiB | error |", "|---|---|---|---|---|"]
    for row in rows:
        said = " ".join(word.replace("activation_checkpointing", "checkpointing") for word in row["settings"])
        said = said.replace("parallel.", "").replace("data.", "").replace("model.", "").replace("train.", "")
        numbers = f"{row['error'] * row['peak'] / 2**20 + row['peak'] / 2**20:.0f} | {row['peak'] / 2**20:.0f}"
        lines.append(f"| {row['ranks']} | {said} | {numbers} | {row['error']:+.1%} |")
    return "\n".join(lines)


@benchmark
def plan() -> dict[str, Any]:
    """Predicted against counted FLOPs, counted traffic and measured peak memory (about 7 minutes)."""
    torch.set_num_threads(1)
    model = load(["+stage=pretrain", *TINY]).config.model
    flops = flops_rows(replace(model, index_topk=6))
    for row in flops:
        print(f"{row['stage']:12} {row['formula']:>12,} FLOPs + {row['beyond']:,} = {row['counted']:,}: {row['equal']}")
    traffic = []
    for world, settings in TRAFFIC:
        traffic.append(traffic_row(world, settings))
        row = traffic[-1]
        counted, even = sum(row["counted"].values()), sum(row["evenly_loaded"].values())
        said = f"{counted:,} bytes, equal: {row['equal']}, evenly loaded {even / counted - 1:+.2%}"
        print(f"{world} ranks {' '.join(settings)}: {said}", flush=True)
    memory = []
    for world, settings in MEMORY:
        memory.append(memory_row(world, settings))
        print(table(memory[-1:]).splitlines()[-1], f"{memory[-1]['seconds']} s", flush=True)
    unmapped = [memory_row(*MEMORY[place], mapped=False) for place in DEFAULT_MALLOC]
    for row in unmapped:
        print(f"as glibc comes: {table([row]).splitlines()[-1]}")
    exact = all(row["equal"] for row in [*flops, *traffic])
    close = all(abs(error) <= TOLERANCE for row in memory for error in (row["error"], *row["floors"]))
    return {
        "config": {"small": list(SMALL), "tiny": list(TINY), "tolerance": TOLERANCE, "steps": STEPS, "threads": 1},
        "rows": {"flops": flops, "traffic": traffic, "memory": memory, "default_malloc": unmapped},
        "passed": exact and close,
    }
