"""How long a training step takes on a cluster, predicted: the FLOPs of train/flops.py and the bytes of
train/communication.py against the rates in conf/cluster.

Parts of a micro-batch follow one another. What this engine hides: ZeRO-3 gathers weights ahead of their use, for as
long as the computing lasts. What it does not: all-to-alls, context parallelism's gathers, and reductions wait where
they are called (`overlap_comm` is off). `hidden`, a share of that rest, asks what another engine could reach.

Left out, so that a real step is longer: imbalance of experts, stragglers, data loading, checkpoints, launches,
the way of offloaded states to CPU memory and back and AdamW's step there.
"""

from __future__ import annotations

from dataclasses import dataclass

from conf.hardware import Cluster
from conf.schema import ModelConfig
from train import activations
from train.communication import flows, layers_of
from train.flops import Row, expert_weights, row_flops
from train.memory_model import Job, held
from train.stages import Stage

STEP_BYTES = 7 * 4  # of a trained value: AdamW reads weight, gradient and moments, writes weight and moments


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on every GPU: `compute` by part, `network` by what travels, both before anything is hidden;
    `waiting`: what is left of the network; `bubble`: of the pipeline; `optimiser`."""

    compute: dict[str, float]
    network: dict[str, float]
    waiting: float
    bubble: float
    optimiser: float
    tokens: int  # of the whole step

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


def network_seconds(job: Job, cluster: Cluster) -> dict[str, float]:
    """Of a step, by what travels: `WHAT, MOMENT`. Within a node and between nodes at once: the slower counts."""
    network = cluster.network
    found: dict[str, float] = {}
    near = network.intra_gb_per_s * 1e9 * network.intra_share
    far = network.inter_gb_per_s * 1e9 * network.inter_share
    for flow in flows(job):
        inside, outside = flow.sent(network.gpus_per_node)
        name = f"{flow.what}, {flow.moment}"
        found[name] = found.get(name, 0.0) + max(inside / near, outside / far)
    return found


def predict_step(job: Job, cluster: Cluster, hidden: float = 0.0) -> StepTime:
    """`hidden`: share of what this engine waits for that another could hide behind computing."""
    share = job.sequences / (job.parallel.cp * job.pp)  # of a sequence's work, on each rank of a replica
    flops = step_flops(job.model, job.stage, job.seq_len, job.checkpointing)
    rates = _rates(cluster, job.stage, job.precision)
    compute = {name: share * count / rates[name] for name, count in flops.items()}
    layers, moe_layers = layers_of(job)
    shape = job.shape
    rows = layers * (shape.rows * job.model.hidden_size * 16) + moe_layers * activations.moe(shape)
    memory = cluster.gpu.memory_gb_per_s * 1e9 * cluster.rates.memory
    passes = cluster.training.passes * (1 if shape.trunk else 1 / 3)
    compute["elementwise"] = job.sequences * passes * rows / memory
    network = network_seconds(job, cluster)
    computing = sum(compute.values())
    ahead = network.get("weights, forward", 0.0)
    rest = sum(network.values()) - ahead
    waiting = max(0.0, ahead - computing) + rest - min(rest * hidden, computing)
    bubble = (job.pp - 1) / job.sequences * (computing + waiting)
    own = held(job.model, job.stage, job.parallel.ep, job.pp, 0)
    mine = sum(
        size / (job.ranks / job.parallel.ep if key[3] else job.ranks) if job.parallel.zero else size
        for key, size in own.groups.items()
        if key[0]
    )
    tokens = job.replicas * job.sequences * job.seq_len
    return StepTime(compute, network, waiting, bubble, STEP_BYTES * mine / memory, tokens)
