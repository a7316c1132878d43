"""What travels between ranks in a step, from the configuration alone; docs/parallel.md derives the formulas.

A flow's bytes are those of the larger buffer of its calls: what an all-gather gives, what a reduce-scatter takes.
tests/distributed/test_communication.py and `python -m bench plan` hold them against what is counted on the collectives.
Expert rows are counted where experts are evenly loaded; with the routers' choices known, `flows` is exact for them too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from train.activations import FP32, INT64
from train.job import Job, embedding, floor_parameters
from train.memory_model import WINDOW
from train.parallel.depth import cut_in_depth
from train.parameters import Parameter, parameters

FP64 = 8


@dataclass(frozen=True)
class Flow:
    """`size` bytes of a step over groups of `ranks` ranks, `stride` apart; `moment`: forward | backward | boundary
    (between backward and step) | step."""

    what: str
    collective: str
    size: int
    ranks: int
    stride: int
    moment: str

    def sent(self, node: int) -> tuple[float, float]:
        """Bytes that a rank sends within its node of `node` ranks, and over its own network card to others.

        Rings pass a call's buffer once round (all-reduce twice), entering a node over one of its cards at a time, which
        the channels take in turn; an all-to-all goes straight to its rank.
        """
        beside = max(1, min(self.ranks, node // self.stride))  # ranks of the group in one node
        if self.collective == "all-to-all":
            return self.size * (beside - 1) / self.ranks, self.size * (self.ranks - beside) / self.ranks
        if self.collective == "send":
            near = self.stride < node
            return (self.size, 0.0) if near else (0.0, self.size)
        passed = self.size * (self.ranks - 1) / self.ranks * (2 if self.collective == "all-reduce" else 1)
        return passed if beside > 1 else 0.0, passed / beside if self.ranks > beside else 0.0


@dataclass(frozen=True)
class Weight:
    """A parameter as its ranks share it: `size` values before ZeRO cuts them; `uses`: calls of its module in a
    forward."""

    parameter: Parameter
    size: int
    ranks: int
    stride: int
    trains: bool
    uses: int

    @property
    def padded(self) -> int:
        return -(-self.size // self.ranks) * self.ranks

    @property
    def group(self) -> tuple[bool, bool, bool]:
        """Of the optimiser."""
        return self.parameter.is_indexer, len(self.parameter.shape) > 1, self.parameter.is_expert and self.stride > 1


def forwards(job: Job) -> int:
    """Times that a layer's forward runs for one micro-batch; what is frozen is not checkpointed."""
    return 2 if job.checkpointing and job.stage.trains_trunk else 1


def weights(job: Job, floor: int = 0) -> list[Weight]:
    """Those of a floor that its ranks share."""
    found, stage = [], job.stage
    for p in floor_parameters(job.model, job.pp, floor):
        ep, uses = job.parallel.ep if p.is_expert else 1, 1
        if p.name.startswith("embed_tokens"):
            uses = 1 + job.with_mtp
        elif p.name.startswith("lm_head"):
            uses = (1 + job.with_mtp) if stage.lm_loss else 0
        elif p.layer is not None and p.layer >= job.model.num_hidden_layers and not job.with_mtp:
            uses = 0
        elif "kv_b_proj" in p.name and stage.attention == "sparse":
            uses = 2  # keys before the attention, values behind
        elif p.is_indexer and stage.attention == "dense" and stage.indexer_loss is None:
            uses = 0
        found.append(Weight(p, p.size // ep, job.ranks // ep, ep, p.trains(stage), uses))
    return [weight for weight in found if weight.ranks > 1]


def gathers(weight: Weight, job: Job, fits: bool) -> int:
    """How often ZeRO-3 puts a parameter together in a step; `fits`: whether all of the rank's lie within its window."""
    if weight.size < job.parallel.persist_below:
        return 1
    if fits:
        return job.sequences * min(1, weight.uses)
    name = weight.parameter.name
    in_layer = name.startswith("layers.") or ".layer." in name
    kept = name.endswith("mlp.down_proj.weight")  # backward begins with it, and then the layer runs again
    forward = weight.uses * (forwards(job) if in_layer and not kept else 1)
    backward = 1 if name.startswith("embed_tokens") else weight.uses
    return job.sequences * (forward + (backward if weight.trains else 0))


def zero_flows(job: Job, floor: int = 0, window: int = WINDOW) -> Iterator[Flow]:
    """Gradients and parameters, fp32 under any precision. `window`: values that ZeRO-3 keeps between two uses."""
    shared, zero = weights(job, floor), job.parallel.zero
    fits = sum(weight.size for weight in shared) <= window
    for (stride, ranks), members in _by(shared, lambda weight: (weight.stride, weight.ranks)):
        trained = [weight for weight in members if weight.trains]
        if job.pp > 1:  # train/parallel/zero1.py
            groups = [group for _, group in _by(trained, lambda weight: weight.group)]
            size = FP32 * sum(ranks * -(-sum(weight.size for weight in group) // ranks) for group in groups)
            yield Flow("gradients", "reduce-scatter", size, ranks, stride, "boundary")
            yield Flow("weights", "all-gather", size, ranks, stride, "step")
            continue
        if zero < 3:
            times = job.sequences if zero == 2 else 1
            size = times * FP32 * sum(weight.size for weight in trained)
            yield Flow("gradients", "all-reduce", size, ranks, stride, "backward" if zero == 2 else "boundary")
        if zero in (1, 2):
            size = 0
            for _, group in _by(trained, lambda weight: weight.group):
                size += FP32 * 2 * ranks * -(-sum(weight.size for weight in group) // (2 * ranks))
            yield Flow("weights", "all-gather", size, ranks, stride, "step")
        if zero == 3:
            size = job.sequences * FP32 * sum(weight.padded for weight in trained)
            yield Flow("gradients", "reduce-scatter", size, ranks, stride, "backward")
            size = FP32 * sum(weight.padded * gathers(weight, job, fits) for weight in members)
            yield Flow("weights", "all-gather", size, ranks, stride, "forward")


def _by(items: list[Weight], key: Callable[[Weight], Any]) -> Iterator[tuple[Any, list[Weight]]]:
    for found, group in groupby(sorted(items, key=key), key=key):
        yield found, list(group)


def layers_of(job: Job, floor: int = 0) -> tuple[int, int]:
    """(layers, MoE layers among them) of a floor that a micro-batch passes, MTP's included."""
    model, layers = job.model, cut_in_depth(job.model, job.pp)[floor]
    mtp = model.num_mtp_layers if job.with_mtp and floor == job.pp - 1 else 0
    return len(layers) + mtp, sum(number >= model.first_k_dense_replace for number in layers) + mtp


def cp_flows(job: Job, documents: int | None = None, floor: int = 0) -> Iterator[Flow]:
    """Latents, index keys and counts of the balance loss, of `documents` in a replica's step; default: one a
    sequence."""
    model, cp, stage = job.model, job.parallel.cp, job.stage
    if cp == 1:
        return
    layers, moe_layers = layers_of(job, floor)
    again, times = forwards(job), job.sequences
    latents = times * layers * job.seq_len * (model.kv_lora_rank + model.qk_rope_head_dim) * FP32
    keys = times * again * layers * job.seq_len * model.index_head_dim * job.shape.b
    yield Flow("latents", "all-gather", again * latents, cp, 1, "forward")
    if stage.trains_trunk:
        yield Flow("latents", "reduce-scatter", latents, cp, 1, "backward")
        documents = times if documents is None else documents
        counts = again * moe_layers * documents * model.n_routed_experts * FP32
        yield Flow("balance", "all-reduce", counts, cp, 1, "forward")
    if stage.attention == "sparse" or stage.indexer_loss is not None:
        yield Flow("index keys", "all-gather", keys, cp, 1, "forward")
        if stage.indexer_loss is not None and stage.trains_indexer:  # their gradient is made in the forward
            yield Flow("index keys", "reduce-scatter", keys, cp, 1, "forward")


def ep_flows(job: Job, rows: int | None = None, floor: int = 0) -> Iterator[Flow]:
    """Rows to their experts and back, and how many there are. `rows`: that this rank sends or receives, whichever are
    more, summed over MoE layers and micro-batches of one pass; default: evenly loaded."""
    model, ep, stage = job.model, job.parallel.ep, job.stage
    if ep == 1:
        return
    _, moe_layers = layers_of(job, floor)
    again = forwards(job)
    if rows is None:
        rows = job.sequences * moe_layers * job.shape.expert_rows
    there_and_back = rows * model.hidden_size * (FP32 + job.shape.b)
    yield Flow("expert rows", "all-to-all", again * there_and_back, ep, 1, "forward")
    if stage.trains_trunk:
        yield Flow("expert rows", "all-to-all", there_and_back, ep, 1, "backward")
    counts = job.sequences * again * moe_layers * model.n_routed_experts * INT64
    yield Flow("expert counts", "all-to-all", counts, ep, 1, "forward")


def pp_flows(job: Job, floor: int = 0) -> Iterator[Flow]:
    """What a floor sends: hidden states to the next one and their gradients back; before the step the gradient of the
    embedding's copy to the first floor, after it the embedding to the last. fp32."""
    if job.pp == 1:
        return
    last, learns = job.pp - 1, job.stage.trains_trunk
    states = job.sequences * job.shape.rows * job.model.hidden_size * FP32
    shared = FP32 * embedding(job.model) if learns and job.model.num_mtp_layers > 0 else 0
    if floor < last:
        yield Flow("hidden states", "send", states, 2, job.ranks, "forward")
    if floor > 0 and learns:
        yield Flow("hidden states", "send", states, 2, job.ranks, "backward")
    if floor in (0, last):
        moment = "step" if floor == 0 else "boundary"
        yield Flow("embedding", "send", shared, 2, job.ranks * last, moment)


def flows(
    job: Job, documents: int | None = None, rows: int | None = None, window: int = WINDOW, floor: int = 0
) -> list[Flow]:
    """Everything but scalars and the step's sums (`scalar_bytes`), as a rank of `floor` has it."""
    found = [*zero_flows(job, floor, window), *cp_flows(job, documents, floor)]
    found += [*ep_flows(job, rows, floor), *pp_flows(job, floor)]
    return [flow for flow in found if flow.size > 0 and flow.ranks > 1]


def by_collective(found: list[Flow]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for flow in found:
        sums[flow.collective] = sums.get(flow.collective, 0) + flow.size
    return sums


def scalar_bytes(job: Job, statistics: bool = False) -> int:
    """All-reduced beside: counts of targets, rows and sequences; sums of losses and metrics (`statistics`: of a logged
    step); gradient norms, for us and for the step."""
    stage, model = job.stage, job.model
    layers = model.num_hidden_layers + (model.num_mtp_layers if job.with_mtp else 0)
    moe_layers = layers - model.first_k_dense_replace
    sums = 2 + moe_layers * model.n_routed_experts + (2 if stage.lm_loss else 0)
    kinds = {"dense": 4, "selected": 2, None: 0}[stage.indexer_loss] if statistics else 0
    sums += layers * (1 + kinds) if stage.indexer_loss is not None else 0
    trained = [p for p in parameters(model) if p.trains(stage)]
    norms = len({(p.is_indexer, len(p.shape) > 1) for p in trained})
    ep = job.parallel.ep
    if ep > 1 and stage.trains_trunk:  # experts have a group of their own, summed where they are the same, then over ep
        norms += 2 if ep < job.world else 1
    if job.pp > 1:
        return 4 * FP64 + (sums + 1) * FP64
    norm_bytes = {0: FP32, 1: 2 * FP32 * norms, 2: 2 * FP32 * norms, 3: 2 * FP64 * norms}
    return 4 * FP64 + sums * FP64 + norm_bytes[job.parallel.zero]
