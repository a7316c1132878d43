"""Cost per token by position, dense against sparse, prefill and decode: predicted for a cluster, measured where we can.

- predicted: DeepSeek-V3.2 on H800 (train/roofline.py, conf/cluster/h800.yaml), in dollars per million tokens, as figure
  3 of the V3.2 report; and what becomes of the ratio at 128K when an assumption is another.
- measured here: a small model on one CPU thread. Prefill is the model's forward pass over T tokens, of which the
  difference from T to 2T is the cost of the tokens in between; decode is one step on a cache of T tokens.
- measured on an H100: one layer's kernels, forward, from bench/results/gpu.json, beside the roofline of the same.

launch/cost_curve.py draws it. The promise: at 128K sparse costs at most half of dense, prefill and decode, under every
assumption here; and where it is measured it is cheaper too.

    python -m bench cost_curve && python launch/cost_curve.py
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from bench.cost import first_length, v3_2
from bench.length import two_layers
from bench.registry import RESULTS, benchmark
from conf.hardware import Cluster, load_cluster
from conf.schema import ModelConfig
from model import Transformer
from model.generate import Decoder
from train.roofline import KINDS, PHASES, dollars_per_million, requests_that_fit, token_seconds

POSITIONS = (0, 1024, 2048, 4096, 8192, *range(16384, 131072, 8192), 131071)
LAST = POSITIONS[-1]
CPU_TOPK, CPU_LENGTHS = 256, (1024, 2048, 4096, 8192, 16384, 32768)
BATCH, REPEATS = 4, 5  # of a decode step
KERNELS = {"dense": ("dense forward, SDPA cudnn",), "sparse": ("index_topk fp8", "sparse_mla forward")}
ATTENTION = ("attention", "index_scores", "topk")  # parts that those kernels are
MAX_RATIO = 0.5
# DeepSeek-V3/R1 inference system overview (H800, 24 hours from 2025-02-27): what a node of 8 did on average
NODE, PREFILL_PER_S, CACHED, DECODE_PER_S, DECODE_CONTEXT = 8, 73_700, 342 / 608, 14_800, 4_989
CALL_PRICES = {"input": (0.56, 0.28), "output": (1.68, 0.42)}  # API, $ a million: V3.1-Terminus, V3.2-Exp


def seconds(model: ModelConfig, cluster: Cluster, kind: str, phase: str, position: int) -> float:
    return sum(token_seconds(model, cluster, kind, phase, position).values())


def predicted(model: ModelConfig, cluster: Cluster, phase: str, position: int) -> dict[str, Any]:
    """One position: GPU microseconds by part, dollars per million tokens, sparse over dense."""
    row: dict[str, Any] = {"phase": phase, "position": position}
    for kind in KINDS:
        parts = token_seconds(model, cluster, kind, phase, position)
        row[kind] = {
            "us": {name: round(value * 1e6, 2) for name, value in parts.items()},
            "dollars": round(dollars_per_million(cluster, sum(parts.values())), 4),
        }
    return row | {"sparse_over_dense": round(row["sparse"]["dollars"] / row["dense"]["dollars"], 3)}


def observed(model: ModelConfig, cluster: Cluster) -> dict[str, dict[str, float]]:
    """DeepSeek's own throughput as dollars, beside what is predicted for V3 (dense) there; `above`: what reality costs
    beyond it. The mean position of prefilled tokens is not published: half the mean context of decode is taken."""
    found = {}
    prefilled = PREFILL_PER_S * (1 - CACHED)
    for phase, per_s, position in (
        ("prefill", prefilled, DECODE_CONTEXT // 2),
        ("decode", DECODE_PER_S, DECODE_CONTEXT),
    ):
        real = dollars_per_million(cluster, NODE / per_s)
        ideal = dollars_per_million(cluster, seconds(model, cluster, "dense", phase, position))
        found[phase] = {"position": position, "observed": real, "predicted": ideal, "above": real - ideal}
    return found


def scenarios(model: ModelConfig, cluster: Cluster) -> list[dict[str, Any]]:
    """Sparse over dense at 128K when an assumption is another."""
    rates, above = cluster.rates, observed(model, cluster)
    ours = replace(rates, index_scores=0.24, sparse_prefill=0.29, dense_prefill=0.54)

    def cost(changed: Cluster, kind: str, phase: str) -> float:
        return dollars_per_million(changed, seconds(model, changed, kind, phase, LAST))

    def full(kind: str) -> Cluster:
        """Every request of a GPU is that long."""
        fits = requests_that_fit(model, cluster, kind, LAST + 1)
        return replace(cluster, serving=replace(cluster.serving, decode_requests=fits))

    cases: list[tuple[str, Callable[[str, str], float]]] = [
        ("as stated", lambda kind, phase: cost(cluster, kind, phase)),
        (
            "indexer at half the rate",
            lambda kind, phase: cost(replace(cluster, rates=replace(rates, index_scores=0.25)), kind, phase),
        ),
        (
            "prefill at the rates of our own kernels",
            lambda kind, phase: cost(replace(cluster, rates=ours), kind, phase),
        ),
        ("every request at 128K: few share the weights", lambda kind, phase: cost(full(kind), kind, phase)),
        (
            "DeepSeek's own throughput: what it costs beyond the roofline at short context added to both",
            lambda kind, phase: cost(cluster, kind, phase) + above[phase]["above"],
        ),
    ]
    rows = []
    for name, of in cases:
        row: dict[str, Any] = {"name": name}
        for phase in PHASES:
            dense, sparse = (of(kind, phase) for kind in KINDS)
            row[phase] = {"dense": round(dense, 3), "sparse": round(sparse, 3), "ratio": round(sparse / dense, 3)}
        rows.append(row)
    return rows


def first_position(model: ModelConfig, cluster: Cluster, phase: str, ratio: float) -> int:
    """From where on a sparse token costs at most `ratio` of a dense one."""

    def cheap(position: int) -> bool:
        sparse, dense = (seconds(model, cluster, kind, phase, position) for kind in ("sparse", "dense"))
        return sparse <= ratio * dense

    return first_length(cheap)


def kernels(model: ModelConfig, cluster: Cluster, measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Microseconds a token and layer, mean over a causal sequence of T: kernels on an H100 and the roofline of an H800,
    whose peaks are the same."""
    by_name = {(row["name"], row["T"]): row["ms"] for row in measured if "T" in row and "ms" in row}
    rows = []
    for length in sorted({length for _, length in by_name}):
        row: dict[str, Any] = {"T": length}
        samples = [round((i + 0.5) * length / 64) for i in range(64)]
        for kind, names in KERNELS.items():
            row[kind] = round(sum(by_name[name, length] for name in names) * 1e3 / length, 3)
            ideal = sum(token_seconds(model, cluster, kind, "prefill", t)[part] for t in samples for part in ATTENTION)
            row[f"{kind}_roofline"] = round(ideal * 1e6 / len(samples) / model.num_hidden_layers, 3)
        rows.append(row)
    return rows


def least_cpu_seconds(step: Callable[[], object], repeats: int) -> float:
    """Of `repeats`; more than one, and a first is not counted."""
    found = []
    for _ in range(repeats + (repeats > 1)):
        start = time.process_time()
        step()
        found.append(time.process_time() - start)
    return min(found[repeats > 1 :])


@torch.no_grad()
def cpu_prefill(net: Transformer, kind: str, lengths: Sequence[int]) -> list[dict[str, float]]:
    """CPU microseconds a token between one length and the next, at the middle of both."""
    whole = {}
    for length in lengths:
        ids = torch.randint(2, net.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        whole[length] = least_cpu_seconds(partial(net.logits, ids, attention=kind), 1 if length > 4096 else 3)
    pairs = zip(lengths, lengths[1:], strict=False)
    return [{"position": (a + b) / 2, "us": (whole[b] - whole[a]) / (b - a) * 1e6} for a, b in pairs]


@torch.no_grad()
def cpu_decode(net: Transformer, kind: str, lengths: Sequence[int]) -> list[dict[str, float]]:
    """CPU microseconds a token of a decode step on caches of each length, BATCH requests at once."""
    decoder = Decoder(net, BATCH, lengths[-1] + 1, kind)
    for held in decoder.tensors():
        held.normal_(generator=torch.Generator().manual_seed(0))
    ids, rows = torch.full((BATCH, 1), 2), []
    for length in lengths:
        at = torch.full((BATCH, 1), length)
        rows.append({"position": length, "us": least_cpu_seconds(partial(decoder.hidden, ids, at), REPEATS)})
    return [row | {"us": row["us"] / BATCH * 1e6} for row in rows]


def cpu(lengths: Sequence[int] = CPU_LENGTHS) -> list[dict[str, Any]]:
    """One row a position: dense and sparse, microseconds a token."""
    torch.set_num_threads(1)
    net = Transformer(replace(two_layers(), index_topk=CPU_TOPK))
    net.init_weights(0)
    rows = []
    for phase, measure in (("prefill", cpu_prefill), ("decode", cpu_decode)):
        dense, sparse = (measure(net, kind, lengths) for kind in KINDS)
        for a, b in zip(dense, sparse, strict=True):
            row = {"phase": phase, "position": a["position"], "dense": round(a["us"], 1), "sparse": round(b["us"], 1)}
            rows.append(row | {"sparse_over_dense": round(b["us"] / a["us"], 3)})
            print(rows[-1], flush=True)
    return rows


def verdict(found: dict[str, Any]) -> list[str]:
    """What can be said of the report's claim, and what cannot; a sentence each."""
    stated, cases, half, even = found["scenarios"][0], found["scenarios"], found["half_from"], found["even_from"]
    spans = []
    for phase in PHASES:
        saved = [1 - case[phase]["ratio"] for case in cases]
        spans.append(f"{1 - stated[phase]['ratio']:.0%} in {phase} ({min(saved):.0%} to {max(saved):.0%})")
    real = found["observed"]
    times = {phase: real[phase]["observed"] / real[phase]["predicted"] for phase in PHASES}
    return [
        f"Predicted at 128K, sparse saves {' and '.join(spans)}; in brackets: under other assumptions.",
        f"It saves half from position {half['prefill']:,} on in prefill and {half['decode']:,} in decode, and nothing"
        f" below {even['prefill']:,} and {even['decode']:,}.",
        "DeepSeek's claim is a price: input $0.56 to $0.28 and output $1.68 to $0.42 a million tokens, 50% and 75% less"
        " whatever the length. At 128K the cost falls by more, in the short requests of most traffic by less.",
        f"At a mean context of 5K its service cost {times['prefill']:.1f} times this roofline in prefill and"
        f" {times['decode']:.1f} times in decode: dollars here are a floor. Ratios at long context stand on the"
        " attention's own FLOPs and bytes.",
        "The report's figure 3 is a drawing without numbers and was not read off here.",
    ]


@benchmark
def cost_curve() -> dict[str, Any]:
    """Cost per token by position, predicted and measured (about 4 minutes)."""
    model, cluster = v3_2(), load_cluster("h800")
    gpu = json.loads((RESULTS / "gpu.json").read_text())
    found: dict[str, Any] = {
        "config": {
            "model": asdict(model),
            "cluster": asdict(cluster),
            "cpu_model": asdict(replace(two_layers(), index_topk=CPU_TOPK)),
            "cpu": {"threads": 1, "decode_batch": BATCH},
        },
        "rows": [predicted(model, cluster, phase, position) for phase in PHASES for position in POSITIONS],
        "scenarios": scenarios(model, cluster),
        "observed": observed(model, cluster),
        "half_from": {phase: first_position(model, cluster, phase, MAX_RATIO) for phase in PHASES},
        "even_from": {phase: first_position(model, cluster, phase, 1.0) for phase in PHASES},
        "h100": {key: gpu[key] for key in ("device", "date", "commit")},
        "h100_rows": kernels(model, cluster, gpu["rows"]),
        "api_prices": CALL_PRICES,
        "cpu_rows": cpu(),
    }
    found["verdict"] = verdict(found)
    longest = {row["phase"]: row["sparse_over_dense"] for row in found["cpu_rows"]}  # rows go up in position
    halved = all(case[phase]["ratio"] <= MAX_RATIO for case in found["scenarios"] for phase in PHASES)
    found["passed"] = halved and all(ratio < 1 for ratio in longest.values())
    print("\n".join(found["verdict"]))
    return found
