"""Layouts of a job that fit a cluster's memory, the quickest first.

Tried are zero, ep, cp (as conf/validate.py allows them), activation checkpointing, and offload of the optimiser where
nothing fits without. What the caller holds fast is not varied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from conf.hardware import Cluster
from train.memory_model import Job, Memory, predict
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
        words += [f"parallel.pp={self.job.pp}"] if self.job.pp > 1 else []
        words += [f"parallel.offload={parallel.offload}"] if parallel.offload != "none" else []
        words.append(f"train.micro_batches={self.job.sequences}")
        words += ["train.activation_checkpointing=true"] if self.job.checkpointing else []
        return " ".join(words)


def powers(most: int) -> Iterator[int]:
    value = 1
    while value <= most:
        yield value
        value *= 2


def candidates(job: Job, step_sequences: int, held: Mapping[str, Any]) -> Iterator[Job]:
    """Layouts of `job.world` processes that take at least `step_sequences` sequences a step. `held`: zero, ep, cp,
    offload, sequences or checkpointing -> the value that stays."""
    trains = job.stage.runner != "evaluate"
    zeros = [held["zero"]] if "zero" in held else [3, 2, 1, 0] if trains else [0]
    experts = job.model.n_routed_experts
    eps = [held["ep"]] if "ep" in held else [ep for ep in powers(experts) if experts % ep == 0]
    cps = [held["cp"]] if "cp" in held else list(powers(job.ranks))
    again = [held["checkpointing"]] if "checkpointing" in held else [False, True] if job.shape.trunk else [False]
    places = [held["offload"]] if "offload" in held else ["none", "cpu"]
    for cp in cps:
        if job.ranks % cp or job.seq_len % (2 * cp if cp > 1 else 1):
            continue
        replicas = job.ranks // cp
        sequences = held.get("sequences") or max(1, -(-step_sequences // replicas))
        if "sequences" not in held and replicas * sequences > max(MAX_OVERSHOOT * step_sequences, step_sequences):
            continue
        for zero in zeros:
            for ep in eps:
                if job.ranks % ep or (ep > 1 and zero == 0):
                    continue
                for offload in places:
                    if offload != "none" and zero == 0 or job.parallel.offload_parameters and zero < 3:
                        continue
                    for checkpointing in again:
                        parallel = replace(job.parallel, zero=zero, ep=ep, cp=cp, offload=offload)
                        yield replace(job, parallel=parallel, sequences=sequences, checkpointing=checkpointing)


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
