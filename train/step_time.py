"""How long a training step takes on a cluster, predicted: the FLOPs of train/flops.py and the bytes of
train/communication.py against the rates in conf/cluster.

Parts of a micro-batch follow one another. What this engine hides: ZeRO-3 gathers weights ahead of their use, for as
long as the computing lasts. What it does not: all-to-alls, context parallelism's gathers, and reductions wait where
they are called (`overlap_comm` is off). `hidden`, a share of that rest, asks what another engine could reach.

In depth (1F1B) a micro-batch passes all floors once, and the slowest floor takes the others behind it: sum of floors +
(micro-batches - 1) times the slowest, which is (pp - 1) / micro-batches of idle time where all are alike.

Left out, so that a real step is longer: imbalance of experts, stragglers, data loading, checkpoints, launches,
the way of offloaded states to CPU memory and back and AdamW's step there.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache

from conf.hardware import Cluster
from conf.schema import ModelConfig
from train import activations
from train.communication import flows, layers_of
from train.flops import Row, expert_weights, row_flops
from train.job import Job, held
from train.parallel.depth import cut_in_depth
from train.stages import Stage

STEP_BYTES = 7 * 4  # of a trained value: AdamW reads weight, gradient and moments, writes weight and moments


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on every GPU, in depth on those of the slowest floor: `compute` by part, `network` by what
    travels, both before anything is hidden; `waiting`: what is left of the network; `bubble`: while the first
    micro-batch passes the other floors, and the last one's gradients; `optimiser`."""

    compute: dict[str, float]
    network: dict[str, float]
    waiting: float
    bubble: float
    optimiser: float
    tokens: int  # of the whole step
    floor: int = 0  # whose seconds these are

    @property
    def total(self) -> float:
        return sum(self.compute.values()) + self.waiting + self.bubble + self.optimiser

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.total


def step_flops(model: ModelConfig, stage: Stage, seq_len: int, checkpointing: bool) -> dict[str, float]:
    """Of one sequence that is one document, by part: those of train/flops.py with experts apart and attention by
    direction; `again`: True forwards of checkpointed layers count as well."""
    row = Row((seq_len,), seq_len, seq_len)
    mtp = stage.runner == "train"
    whole = row_flops(model, stage, row, mtp=mtp)
    forward = row_flops(model, stage, row, mtp=mtp, backward=False)
    repeats = 1 if checkpointing and stage.trunk_grad and stage.trains_trunk else 0
    layers = model.num_hidden_layers - model.first_k_dense_replace
    with_mtp = layers + (model.num_mtp_layers if mtp and (stage.lm_loss or stage.indexer_loss is not None) else 0)
    experts = 2 * expert_weights(model)[0] / max(1, layers) * with_mtp * seq_len
    trunk = whole["linear"] / forward["linear"]
    return {
        "linear": whole["linear"] + repeats * forward["linear"] - experts * (trunk + repeats)
        + whole["index_linear"] + repeats * forward["index_linear"],
        "experts": experts * (trunk + repeats),
        "head": float(whole["head"]),
        "attention_forward": float(forward["attention"] * (1 + repeats)),
        "attention_backward": float(whole["attention"] - forward["attention"]),
        "index_scores": float(forward["index_scores"] * (1 + repeats)),
        "index_loss": float((whole["index_scores"] - forward["index_scores"]) * (1 + repeats)),
    }  # fmt: skip


def _rates(cluster: Cluster, stage: Stage, precision: str) -> dict[str, float]:
    """FLOP/s by part."""
    gpu, shares = cluster.gpu, cluster.training
    peak = (gpu.fp32_tflops if precision == "fp32" else gpu.bf16_tflops) * 1e12
    fp8 = gpu.fp8_tflops * 1e12
    linear = fp8 * shares.linear_fp8 if precision == "fp8" else peak * shares.linear
    experts = fp8 * shares.experts_fp8 if precision == "fp8" else peak * shares.experts
    dense, warmup = stage.attention == "dense", stage.indexer_loss == "dense"
    forward = shares.warmup if warmup else shares.dense_forward if dense else shares.sparse_forward
    return {
        "linear": linear,
        "experts": experts,
        "head": peak * shares.linear,
        "attention_forward": peak * forward,
        "attention_backward": peak * (shares.dense_backward if dense else shares.sparse_backward),
        "index_scores": peak * (shares.warmup if warmup else shares.index_scores),
        "index_loss": peak * (shares.warmup if warmup else shares.index_loss),
    }


def network_seconds(job: Job, cluster: Cluster, floor: int = 0) -> dict[str, float]:
    """Of a step, by what travels: `WHAT, MOMENT`. Within a node and between nodes at once: the slower counts."""
    network = cluster.network
    found: dict[str, float] = {}
    near = network.intra_gb_per_s * 1e9 * network.intra_share
    far = network.inter_gb_per_s * 1e9 * network.inter_share
    for flow in flows(job, floor=floor):
        inside, outside = flow.sent(network.gpus_per_node)
        name = f"{flow.what}, {flow.moment}"
        found[name] = found.get(name, 0.0) + max(inside / near, outside / far)
    return found


@cache
def floor_flops(
    model: ModelConfig, stage: Stage, seq_len: int, checkpointing: bool, pp: int, floor: int
) -> dict[str, float]:
    """`step_flops` of the layers of a floor; the last one has MTP and the heads."""
    layers, last = cut_in_depth(model, pp)[floor], floor == pp - 1
    dense = sum(number < model.first_k_dense_replace for number in layers)
    mtp = model.num_nextn_predict_layers if last else 0
    part = replace(model, num_hidden_layers=len(layers), first_k_dense_replace=dense, num_nextn_predict_layers=mtp)
    found = step_flops(part, stage, seq_len, checkpointing)
    return found if last else found | {"head": 0.0}


def floor_seconds(job: Job, cluster: Cluster, floor: int) -> dict[str, float]:
    """What a floor's GPUs compute in a step, by part."""
    share = job.sequences / job.parallel.cp  # of a sequence's work, on each rank of a replica
    rates = _rates(cluster, job.stage, job.precision)
    flops = floor_flops(job.model, job.stage, job.seq_len, job.checkpointing, job.pp, floor)
    compute = {name: share * count / rates[name] for name, count in flops.items()}
    layers, moe_layers = layers_of(job, floor)
    shape = job.shape
    rows = layers * (shape.rows * job.model.hidden_size * 16) + moe_layers * activations.moe(shape)
    memory = cluster.gpu.memory_gb_per_s * 1e9 * cluster.rates.memory
    passes = cluster.training.passes * (1 if shape.trunk else 1 / 3)
    return compute | {"elementwise": job.sequences * passes * rows / memory}


@dataclass(frozen=True)
class _Floor:
    """Seconds of a step: computing, waiting while micro-batches run, and waiting for what a step does once."""

    floor: int
    compute: dict[str, float]
    network: dict[str, float]
    waiting: float
    once: float

    @property
    def busy(self) -> float:
        return sum(self.compute.values()) + self.waiting


def _floor(job: Job, cluster: Cluster, hidden: float, floor: int) -> _Floor:
    compute, network = floor_seconds(job, cluster, floor), network_seconds(job, cluster, floor)
    computing, ahead = sum(compute.values()), network.get("weights, forward", 0.0)
    once = sum(seconds for name, seconds in network.items() if name.endswith((", boundary", ", step")))
    rest = sum(network.values()) - ahead
    waiting = max(0.0, ahead - computing) + rest - min(rest * hidden, computing)
    return _Floor(floor, compute, network, waiting - min(once, waiting), min(once, waiting))


def _kinds_of_floor(job: Job) -> list[int]:
    """For each floor the first one with as many layers of both kinds; the two ends are like no other."""
    ends, dense = (0, job.pp - 1), job.model.first_k_dense_replace
    kinds = [
        (floor if floor in ends else None, len(layers), sum(number < dense for number in layers))
        for floor, layers in enumerate(cut_in_depth(job.model, job.pp))
    ]
    return [kinds.index(kind) for kind in kinds]


def predict_step(job: Job, cluster: Cluster, hidden: float = 0.0) -> StepTime:
    """`hidden`: share of what this engine waits for that another could hide behind computing."""
    alike = Counter(_kinds_of_floor(job))  # of many floors few differ
    floors = {floor: _floor(job, cluster, hidden, floor) for floor in alike}
    slowest = max(floors.values(), key=lambda floor: floor.busy)
    every = sum(count * floors[floor].busy for floor, count in alike.items())
    bubble = (every - slowest.busy) / job.sequences
    waiting = slowest.waiting + max(floor.once for floor in floors.values())
    memory = cluster.gpu.memory_gb_per_s * 1e9 * cluster.rates.memory
    own = held(job.model, job.stage, job.parallel.ep, job.pp, slowest.floor)
    mine = sum(
        size / (job.ranks / job.parallel.ep if key[3] else job.ranks) if job.parallel.zero else size
        for key, size in own.groups.items()
        if key[0]
    )
    tokens = job.replicas * job.sequences * job.seq_len
    return StepTime(
        slowest.compute, slowest.network, waiting, bubble, STEP_BYTES * mine / memory, tokens,
        slowest.floor,
    )  # fmt: skip
