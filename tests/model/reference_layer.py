"""One attention layer of DeepSeek-V3.2 in fp64, written from the report's description (arXiv 2512.02556, sec. 2.1).

It shares no code with `model/`: rotations are complex multiplications, attention is a loop over queries, the selection
is Python's sort. `IndexerVariant` can be set to the mistakes that have been made elsewhere; each is silent while
T <= index_topk, so the conformance tests run at T > index_topk and must see every one of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.schema import ModelConfig, RopeConfig

LATENT_NORM_EPS = 1e-6


@dataclass(frozen=True)
class IndexerVariant:
    """The indexer as published. Any other value is a known mistake, except `hadamard`, which must change nothing."""

    rope: str = "half_split"  # half_split | interleaved: which pairs turn together
    rope_first: bool = True  # head layout [rope, nope]; MLA's own is [nope, rope]
    k_norm: str = "layer"  # layer | rms
    k_norm_eps: float = 1e-6
    relu: bool = True
    scale: str = "index"  # index: Hi^-0.5 * di^-0.5 | mla: Hi^-0.5 times MLA's softmax scale | none
    hadamard: bool = False  # orthogonal transform of q and k before an FP8 product


@dataclass
class LayerResult:
    out: Tensor  # [T, D]
    scores: Tensor  # [T, T], -inf where not visible
    chosen: list[list[int]]  # a row's positions, ascending
    q_latent: Tensor  # [T, q_lora_rank]


def yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotations(rope: RopeConfig, dim: int, positions: Tensor) -> Tensor:
    """complex128 [T, dim/2]: e^(i * position * frequency), with YaRN's frequencies and its magnitude."""
    frequencies = []
    for i in range(dim // 2):
        frequency = rope.theta ** (-2 * i / dim)
        if rope.factor > 1:
            # the pair that turns `beta` times over the original context
            turns = [
                rope.original_max_position_embeddings / (2 * math.pi * beta)
                for beta in (rope.beta_fast, rope.beta_slow)
            ]
            low, high = (dim * math.log(n) / (2 * math.log(rope.theta)) for n in turns)
            low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
            interpolated = min(max((i - low) / max(high - low, 0.001), 0.0), 1.0)
            frequency = interpolated * frequency / rope.factor + (1 - interpolated) * frequency
        frequencies.append(frequency)
    angles = positions.double()[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    magnitude = yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return torch.polar(torch.full_like(angles, magnitude), angles)


def rotate(x: Tensor, turn: Tensor, pairs: str) -> Tensor:
    """x [T, H, dim] turned by complex [T, dim/2]; `pairs` says which two numbers make one complex number."""
    assert pairs in ("half_split", "interleaved"), pairs
    if pairs == "half_split":
        half = x.shape[-1] // 2
        turned = torch.complex(x[..., :half], x[..., half:]) * turn[:, None]
        return torch.cat([turned.real, turned.imag], dim=-1)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn[:, None]
    return torch.view_as_real(turned).flatten(-2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight + bias


def hadamard_matrix(size: int) -> Tensor:
    """Orthonormal; `size` a power of two (Sylvester)."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    assert matrix.shape[0] == size, size
    return matrix * size**-0.5


def index_scores(
    weights: dict[str, Tensor],
    config: ModelConfig,
    x: Tensor,
    q_latent: Tensor,
    positions: Tensor,
    variant: IndexerVariant,
) -> Tensor:
    """I [T, T] over all pairs, for x [T, D] and the normalised q latent [T, q_lora_rank]."""
    heads, dim, rope_dim = config.index_n_heads, config.index_head_dim, config.qk_rope_head_dim
    turn = rotations(config.rope, rope_dim, positions)

    def position(head: Tensor) -> Tensor:
        sizes = [rope_dim, dim - rope_dim] if variant.rope_first else [dim - rope_dim, rope_dim]
        parts = list(head.split(sizes, dim=-1))
        where = 0 if variant.rope_first else 1
        parts[where] = rotate(parts[where], turn, variant.rope)
        head = torch.cat(parts, dim=-1)
        return head @ hadamard_matrix(dim) if variant.hadamard else head

    q = position((q_latent @ weights["indexer.wq_b.weight"].T).unflatten(-1, (heads, dim)))
    key = x @ weights["indexer.wk.weight"].T
    if variant.k_norm == "layer":
        key = layer_norm(key, weights["indexer.k_norm.weight"], weights["indexer.k_norm.bias"], variant.k_norm_eps)
    else:
        key = rms_norm(key, weights["indexer.k_norm.weight"], variant.k_norm_eps)
    k = position(key[:, None])[:, 0]
    scale = {"index": heads**-0.5 * dim**-0.5, "mla": heads**-0.5 * mla_scale(config), "none": 1.0}[variant.scale]
    w = x @ weights["indexer.weights_proj.weight"].T * scale
    products = torch.stack([q[:, h] @ k.T for h in range(heads)])
    products = products.clamp(min=0) if variant.relu else products
    return (w.T[:, :, None] * products).sum(dim=0)


def mla_scale(config: ModelConfig) -> float:
    return config.qk_head_dim**-0.5 * yarn_mscale(config.rope.factor, config.rope.mscale_all_dim) ** 2


def mla_heads(weights: dict[str, Tensor], config: ModelConfig, x: Tensor, q_latent: Tensor, positions: Tensor):
    """q, k [T, H, nope + rope] and v [T, H, v] of the decompressed form."""
    heads, nope, rope, value = (
        config.num_attention_heads,
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
    )
    turn = rotations(config.rope, rope, positions)
    q = (q_latent @ weights["q_b_proj.weight"].T).unflatten(-1, (heads, nope + rope))
    q = torch.cat([q[..., :nope], rotate(q[..., nope:], turn, "interleaved")], dim=-1)
    compressed = x @ weights["kv_a_proj_with_mqa.weight"].T
    latent = rms_norm(compressed[:, : config.kv_lora_rank], weights["kv_a_layernorm.weight"], LATENT_NORM_EPS)
    k_rope = rotate(compressed[:, None, config.kv_lora_rank :], turn, "interleaved").expand(-1, heads, -1)
    up = (latent @ weights["kv_b_proj.weight"].T).unflatten(-1, (heads, nope + value))
    return q, torch.cat([up[..., :nope], k_rope], dim=-1), up[..., nope:]


def attention_layer(
    weights: dict[str, Tensor],
    config: ModelConfig,
    x: Tensor,
    doc_start: Tensor,
    sparse: bool = True,
    variant: IndexerVariant | None = None,
) -> LayerResult:
    """x [T, D] (after the input norm), doc_start [T]; `weights` as under `self_attn.` in a checkpoint; all made fp64.

    Dense where `sparse` is false. Rows of padding (doc_start > t) give 0.
    """
    weights = {name: tensor.detach().double() for name, tensor in weights.items()}
    x = x.detach().double()
    positions = (torch.arange(x.shape[0]) - doc_start).clamp(min=0)
    q_latent = rms_norm(x @ weights["q_a_proj.weight"].T, weights["q_a_layernorm.weight"], LATENT_NORM_EPS)
    scores = index_scores(weights, config, x, q_latent, positions, variant or IndexerVariant())
    q, k, v = mla_heads(weights, config, x, q_latent, positions)

    out = torch.zeros(x.shape[0], config.num_attention_heads * config.v_head_dim, dtype=torch.float64)
    chosen, hidden = [], torch.ones_like(scores, dtype=torch.bool)
    for t, start in enumerate(doc_start.tolist()):
        seen = list(range(start, t + 1))
        row = scores[t].tolist()
        best = sorted(sorted(seen, key=lambda s: (-row[s], s))[: config.index_topk]) if sparse else seen  # noqa: B023
        chosen.append(best)
        hidden[t, seen] = False
        if best:
            weight = torch.einsum("hd,shd->hs", q[t], k[best]).mul(mla_scale(config)).softmax(dim=-1)
            out[t] = torch.einsum("hs,shv->hv", weight, v[best]).flatten()
    return LayerResult(out @ weights["o_proj.weight"].T, scores.masked_fill(hidden, -torch.inf), chosen, q_latent)
