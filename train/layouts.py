"""Layouts of a job that fit a cluster's memory, the quickest first.

Tried are zero, ep, cp, pp (as conf/validate.py allows them), activation checkpointing, and offload of the optimiser
where nothing fits without. What the caller holds fast is not varied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from conf.hardware import Cluster
from conf.schema import ParallelConfig
from conf.validate_pipeline import micro_batches_needed
from train.job import Job
from train.memory_model import Memory, predict
from train.step_time import StepTime, predict_step

MAX_OVERSHOOT = 1.25  # of the sequences that a step should take, where they do not divide among replicas


@dataclass(frozen=True)
class Found:
    job: Job
    memory: Memory
    time: StepTime

    @property
    def settings(self) -> str:
        """As the command line takes them."""
        parallel = self.job.parallel
        words = [f"parallel.{key}={getattr(parallel, key)}" for key in ("zero", "ep", "cp")]
        words += [f"parallel.pp={parallel.pp}"] if parallel.pp > 1 else []
        words += [f"parallel.offload={parallel.offload}"] if parallel.offload != "none" else []
        words.append(f"train.micro_batches={self.job.sequences}")
        words += ["train.activation_checkpointing=true"] if self.job.checkpointing else []
        return " ".join(words)


def powers(most: int) -> Iterator[int]:
    value = 1
    while value <= most:
        yield value
        value *= 2


def enough_micro_batches(job: Job, step_sequences: int) -> int:
    """Of a replica, so that a step takes `step_sequences` sequences or a few more, as 1F1B can run them."""
    return micro_batches_needed("1f1b", job.pp, -(-step_sequences // job.replicas))


def layouts(job: Job, held: Mapping[str, Any]) -> Iterator[ParallelConfig]:
    """What conf/validate.py allows of zero, ep, cp, pp and offload; with pp above 1 an engine of its own runs, under
    ZeRO-1 alone."""
    trains, model = job.stage.runner == "train", job.model
    ways: dict[str, list[Any]] = {
        "pp": [pp for pp in powers(model.num_hidden_layers) if pp == 1 or trains],
        "cp": list(powers(job.world)),
        "zero": [3, 2, 1, 0],
        "ep": [ep for ep in powers(model.n_routed_experts) if model.n_routed_experts % ep == 0],
        "offload": ["none", "cpu"],
    }
    ways |= {key: [held[key]] for key in ways if key in held}
    for pp, cp, zero, ep, offload in product(*ways.values()):
        ranks, moved = job.world // pp, offload != "none"
        if job.world % pp or ranks % cp or ranks % ep or job.seq_len % (2 * cp if cp > 1 else 1):
            continue
        if zero == 0 and (ep > 1 or moved) or job.parallel.offload_parameters and zero < 3:
            continue
        if pp > 1 and (zero != 1 or moved):
            continue
        yield replace(job.parallel, pp=pp, cp=cp, zero=zero, ep=ep, offload=offload)


def candidates(job: Job, step_sequences: int, held: Mapping[str, Any]) -> Iterator[Job]:
    """Layouts of `job.world` processes that take at least `step_sequences` sequences a step. `held`: zero, ep, cp, pp,
    offload, sequences or checkpointing -> the value that stays."""
    again = [held["checkpointing"]] if "checkpointing" in held else [False, True] if job.shape.trunk else [False]
    for parallel in layouts(job, held):
        tried = replace(job, parallel=parallel)
        sequences = held.get("sequences") or enough_micro_batches(tried, step_sequences)
        too_many = "sequences" not in held and tried.replicas * sequences > MAX_OVERSHOOT * step_sequences
        if sequences != micro_batches_needed("1f1b", parallel.pp, sequences) or too_many:
            continue
        for checkpointing in again:
            yield replace(tried, sequences=sequences, checkpointing=checkpointing)


def search(
    job: Job, cluster: Cluster, step_sequences: int, held: Mapping[str, Any], hidden: float = 0.0
) -> list[Found]:
    """All that fit, the quickest first; those with offload only where none fits without."""
    limit, fits = cluster.gpu.memory_gb * 1e9, []
    for tried in candidates(job, step_sequences, held):
        memory = predict(tried)
        if memory.total <= limit:
            fits.append(Found(tried, memory, predict_step(tried, cluster, hidden)))
    fits.sort(key=lambda found: (found.job.parallel.offload != "none", -found.time.tokens_per_s))
    plain = [found for found in fits if found.job.parallel.offload == "none"]
    return plain or fits


def leanest(job: Job, step_sequences: int, held: Mapping[str, Any]) -> tuple[Job, Memory] | None:
    """What takes the least memory, for those whom nothing fits; None where no layout takes so few sequences a step."""
    found = [(tried, predict(tried)) for tried in candidates(job, step_sequences, held)]
    return min(found, key=lambda pair: pair[1].total, default=None)
