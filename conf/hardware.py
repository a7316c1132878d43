"""Clusters as data: what a GPU can do, which share of it kernels reach, how GPUs are joined, how a model is served
(conf/cluster).

Beside the groups of a run: nothing that trains reads it. The roofline (train/roofline.py) and the planner do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from conf.errors import UserError, nearest

CLUSTERS = Path(__file__).resolve().parent / "cluster"
T = TypeVar("T")


@dataclass(frozen=True)
class Gpu:
    """Peaks of one GPU: dense tensor-core TFLOP/s, memory in GB and GB/s (powers of ten), rent."""

    name: str
    fp32_tflops: float
    bf16_tflops: float
    fp8_tflops: float
    memory_gb: float
    memory_gb_per_s: float
    dollars_per_hour: float


@dataclass(frozen=True)
class Rates:
    """Share of a peak that kernels reach: `memory` of the bandwidth, `linear` and `index_scores` of FP8, the core
    attention of bf16."""

    memory: float
    linear: float
    index_scores: float
    dense_prefill: float
    sparse_prefill: float
    dense_decode: float
    sparse_decode: float


@dataclass(frozen=True)
class Network:
    """GPUs of the cluster and of a node; GB/s that a GPU sends within its node and to other nodes, one way, and the
    shares of both that collectives reach."""

    gpus: int
    gpus_per_node: int
    intra_gb_per_s: float
    inter_gb_per_s: float
    intra_share: float
    inter_share: float


@dataclass(frozen=True)
class Training:
    """Share of a peak (bf16's; fp32's under precision=fp32; `*_fp8` FP8's) that training reaches of the FLOPs that
    train/flops.py counts: what kernels compute twice lowers it. `warmup`: dense attention with the indexer's loss.
    `passes`: times that a byte kept for backward is written or read by norms, gates and copies beside products."""

    linear: float
    linear_fp8: float
    experts: float
    experts_fp8: float
    dense_forward: float
    dense_backward: float
    sparse_forward: float
    sparse_backward: float
    index_scores: float
    index_loss: float
    warmup: float
    passes: float


@dataclass(frozen=True)
class Serving:
    """How a model is served: expert parallelism, what a GPU has in hand in one forward, bytes of what it reads."""

    prefill_ep: int
    decode_ep: int
    prefill_tokens: int
    decode_requests: int
    weight_bytes: float  # a parameter
    dense_latent_bytes: float  # a token and layer
    sparse_latent_bytes: float
    index_key_bytes: float
    topk_passes: float  # over the fp32 scores


@dataclass(frozen=True)
class Cluster:
    """One file of conf/cluster."""

    gpu: Gpu
    network: Network
    training: Training
    rates: Rates
    serving: Serving


def load_cluster(given: str) -> Cluster:
    """A YAML file, or the name of one under conf/cluster. UserError with one line where it is not one."""
    path = next((path for path in (Path(given), CLUSTERS / f"{given}.yaml") if path.is_file()), None)
    if path is None:
        names = sorted(path.stem for path in CLUSTERS.glob("*.yaml"))
        raise UserError(
            f"there is no cluster {given}: give a YAML file or one of conf/cluster, {nearest(given, names)}"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    cluster = _built(Cluster, values, f"{path}: ")
    shares = {f"rates.{name}": rate for name, rate in vars(cluster.rates).items()}
    shares |= {f"training.{name}": rate for name, rate in vars(cluster.training).items() if name != "passes"}
    shares |= {f"network.{name}": rate for name, rate in vars(cluster.network).items() if name.endswith("_share")}
    beyond = [f"{name}={rate:g}" for name, rate in shares.items() if rate > 1]
    if beyond:
        raise UserError(f"{path}: {beyond[0]} is more than the peak: give a share of it, at most 1")
    network = cluster.network
    if network.gpus % min(network.gpus, network.gpus_per_node):
        raise UserError(
            f"{path}: network.gpus={network.gpus} does not divide by gpus_per_node={network.gpus_per_node}: give whole"
            " nodes"
        )
    return cluster


def _built(cls: type[T], values: Any, where: str) -> T:
    """Every field given, none beside them, numbers above 0."""
    hints = get_type_hints(cls)
    if not isinstance(values, Mapping):
        raise UserError(f"{where.rstrip(': .')} must be a mapping of {', '.join(hints)}")
    for key in values:
        if key not in hints:
            raise UserError(f"{where}unknown key {key}: {nearest(str(key), hints)}")
    found: dict[str, Any] = {}
    for spec in fields(cls):  # type: ignore[arg-type]
        hint = hints[spec.name]
        if spec.name not in values:
            raise UserError(f"{where}{spec.name} is missing: give it")
        value = values[spec.name]
        if is_dataclass(hint):
            found[spec.name] = _built(hint, value, f"{where}{spec.name}.")  # type: ignore[arg-type]
        elif hint is str:
            found[spec.name] = str(value)
        elif isinstance(value, bool) or not isinstance(value, int | hint) or not value > 0:
            raise UserError(
                f"{where}{spec.name}={value!r} must be {'a whole number' if hint is int else 'a number'} > 0"
            )
        else:
            found[spec.name] = hint(value)
    return cls(**found)
