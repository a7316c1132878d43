"""What a token costs on a cluster, predicted: FLOPs and bytes of its parts against the rates of one GPU.

A part takes as long as the slower of its products and its reads; the parts follow one another. FLOPs are those of
train/flops.py, bytes what must come from memory once: weights, shared by the tokens of a forward, and of each request's
own cache the latents and index keys that a decode step reads.

Left out, so that a real cluster is dearer: networks (expert parallelism hides them behind a second micro-batch),
imbalance of experts and requests, launches, sampling, idle GPUs. Multi-token prediction, which lets a decode step give
more than one token, would make both kinds of attention cheaper.
"""

from __future__ import annotations

from dataclasses import dataclass

from conf.hardware import Cluster
from conf.schema import ModelConfig
from train.flops import (
    expert_weights,
    head_weights,
    indexer_weights,
    layer_weights,
    pair_flops,
    sampler_flops,
)

PHASES = ("prefill", "decode")
KINDS = ("dense", "sparse")
PARTS = ("linear", "experts", "head", "attention", "index_linear", "index_scores", "topk")
SCORE_BYTES = 4  # fp32


@dataclass(frozen=True)
class Part:
    """Of one token: FLOPs, bytes, and the TFLOP/s that its products run at."""

    flops: float
    bytes: float
    tflops: float

    def seconds(self, cluster: Cluster) -> float:
        bytes_per_s = cluster.gpu.memory_gb_per_s * 1e9 * cluster.rates.memory
        return max(self.flops / (self.tflops * 1e12), self.bytes / bytes_per_s)


def token_parts(model: ModelConfig, cluster: Cluster, kind: str, phase: str, position: int) -> dict[str, Part]:
    """One token that sees `position` tokens before it, under `kind` of attention (dense | sparse), in a `phase`
    (prefill | decode).

    Dense prefill decompresses heads, everything else is absorbed; sparse prefill takes the cheaper of reading the
    selection absorbed and reading all keys decompressed under a mask, as the report does for short sequences.
    """
    assert kind in KINDS and phase in PHASES
    gpu, rates, serving = cluster.gpu, cluster.rates, cluster.serving
    decodes, dense, layers, seen = phase == "decode", kind == "dense", model.num_hidden_layers, position + 1
    flops = sampler_flops(model, kind, position, seen, int(decodes))
    active, routed = expert_weights(model)
    linear, scores = gpu.fp8_tflops * rates.linear, gpu.fp8_tflops * rates.index_scores
    ep = serving.decode_ep if decodes else serving.prefill_ep
    sharing = serving.decode_requests if decodes else serving.prefill_tokens  # tokens that read the weights together

    def weights(count: float) -> float:
        return count * serving.weight_bytes / sharing

    if decodes:
        rate = rates.dense_decode if dense else rates.sparse_decode
        latents = (
            serving.dense_latent_bytes * seen if dense else serving.sparse_latent_bytes * min(seen, model.index_topk)
        )
        attention = Part(flops["attention"], layers * latents, gpu.bf16_tflops * rate)
    else:
        masked = Part(layers * pair_flops(model, "dense") * seen, 0.0, gpu.bf16_tflops * rates.dense_prefill)
        gathered = layers * serving.dense_latent_bytes * min(seen, model.index_topk)  # bf16 rows, each query its own
        absorbed = Part(flops["attention"], gathered, gpu.bf16_tflops * rates.sparse_prefill)
        quicker = min(masked, absorbed, key=lambda part: part.seconds(cluster))
        attention = masked if dense else quicker
    scored = seen if flops["index_scores"] else 0
    indexer = 0 if dense else layers * indexer_weights(model)  # the sampler runs it for dense attention too
    keys = layers * serving.index_key_bytes * scored if decodes else 0.0
    return {
        "linear": Part(flops["linear"] - 2 * active, weights(layer_weights(model) - active), linear),
        "experts": Part(2 * active, weights(routed / ep), linear),
        "head": Part(flops["head"], weights(head_weights(model)) if decodes else 0.0, linear),
        "attention": attention,
        "index_linear": Part(2 * indexer, weights(indexer), linear),
        "index_scores": Part(flops["index_scores"], keys, scores),
        "topk": Part(0.0, layers * SCORE_BYTES * serving.topk_passes * scored, linear),
    }


def token_seconds(model: ModelConfig, cluster: Cluster, kind: str, phase: str, position: int) -> dict[str, float]:
    """GPU seconds of one token by part (PARTS); arguments: as `token_parts`."""
    parts = token_parts(model, cluster, kind, phase, position)
    return {name: part.seconds(cluster) for name, part in parts.items()}


def dollars_per_million(cluster: Cluster, seconds: float) -> float:
    """Of GPU seconds a token -> rent for a million of them."""
    return seconds * 1e6 / 3600 * cluster.gpu.dollars_per_hour


def requests_that_fit(model: ModelConfig, cluster: Cluster, kind: str, length: int) -> int:
    """Requests of `length` tokens whose caches a GPU that decodes can hold beside its weights; a tenth of the memory is
    left for everything else."""
    serving = cluster.serving
    active, routed = expert_weights(model)
    dense = kind == "dense"
    indexers = 0 if dense else model.num_hidden_layers * indexer_weights(model)
    held = layer_weights(model) - active + routed / serving.decode_ep + 2 * head_weights(model) + indexers
    row = serving.dense_latent_bytes if dense else serving.sparse_latent_bytes + serving.index_key_bytes
    free = 0.9e9 * cluster.gpu.memory_gb - held * serving.weight_bytes
    return int(free // (row * model.num_hidden_layers * length))
