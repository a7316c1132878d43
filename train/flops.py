"""Model FLOPs from the configuration alone: what the mathematics asks for, not what a kernel happens to do.

Counted are products: an [n, k] weight times a token is 2nk, a pair of query and key 2 x the widths that meet. A part
that trains costs its forward twice more (gradients of input and weight), the indexer's projections once more: their
inputs are constants. Not counted: elementwise work, softmax, norms, gathers, the top-k itself, masked or padded
entries, and whatever a backward pass makes a second time (probabilities, logits, checkpointed layers).
tests/train/test_flops.py holds all of it against torch's own counter, and names what runs beyond it.

Pairs of a document of L tokens: L (L + 1) / 2 are visible; sparse attention reads sum over rows of min(k, visible).
In training the indexer scores every visible pair; the sampler leaves that out for rows that see no more than k keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from conf.schema import ModelConfig
from train.stages import Stage


@dataclass(frozen=True)
class Row:
    """A packed row: `lengths` of its documents without padding; `targets` labels that the head meets, `mtp_targets`
    those of multi-token prediction."""

    lengths: tuple[int, ...]
    targets: int
    mtp_targets: int = 0


def visible_pairs(lengths: Iterable[int]) -> int:
    return sum(length * (length + 1) // 2 for length in lengths)


def selected_pairs(lengths: Iterable[int], topk: int) -> int:
    """Sum over rows of min(topk, keys that the row sees)."""
    short = [min(length, topk) for length in lengths]
    return visible_pairs(short) + topk * sum(length - few for length, few in zip(lengths, short, strict=True))


def attention_weights(model: ModelConfig) -> int:
    """Weights of one layer's MLA that a token meets, in either form: absorbed, W_UK meets the query and W_UV the
    output."""
    heads, hidden = model.num_attention_heads, model.hidden_size
    query = hidden * model.q_lora_rank + model.q_lora_rank * heads * model.qk_head_dim
    latent = hidden * (model.kv_lora_rank + model.qk_rope_head_dim)
    up = model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    return query + latent + up + heads * model.v_head_dim * hidden


def indexer_weights(model: ModelConfig) -> int:
    """Of one layer's indexer."""
    queries = model.q_lora_rank * model.index_n_heads * model.index_head_dim
    return queries + model.hidden_size * (model.index_head_dim + model.index_n_heads)


def moe_weights(model: ModelConfig) -> int:
    """Of one layer's router and of the experts that a token meets."""
    active = model.num_experts_per_tok + model.n_shared_experts
    return 3 * model.hidden_size * model.moe_intermediate_size * active + model.hidden_size * model.n_routed_experts


def expert_weights(model: ModelConfig) -> tuple[int, int]:
    """Of the routed experts of all main layers: those that a token meets, and all that there are."""
    layers = max(0, model.num_hidden_layers - model.first_k_dense_replace)
    one = 3 * model.hidden_size * model.moe_intermediate_size * layers
    return one * model.num_experts_per_tok, one * model.n_routed_experts


def layer_weights(model: ModelConfig) -> int:
    """Of all main layers, indexers left out."""
    first = min(model.first_k_dense_replace, model.num_hidden_layers)
    mlps = first * 3 * model.hidden_size * model.intermediate_size
    mlps += (model.num_hidden_layers - first) * moe_weights(model)
    return model.num_hidden_layers * attention_weights(model) + mlps


def head_weights(model: ModelConfig) -> int:
    return model.hidden_size * model.vocab_size


def mtp_weights(model: ModelConfig) -> int:
    """Of the multi-token-prediction modules, their indexers and the head left out."""
    one = attention_weights(model) + moe_weights(model) + 2 * model.hidden_size * model.hidden_size
    return model.num_mtp_layers * one


def trunk_weights(model: ModelConfig) -> int:
    """Weights outside the indexer that one token meets: active experts, the head, and MTP's own layer and head."""
    return layer_weights(model) + mtp_weights(model) + (1 + model.num_mtp_layers) * head_weights(model)


def pair_flops(model: ModelConfig, attention: str) -> int:
    """Attention's forward for one pair of query and key: decompressed heads if dense, shared latent rows if sparse."""
    if attention == "dense":
        return 2 * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim)
    return 2 * model.num_attention_heads * (2 * model.kv_lora_rank + model.qk_rope_head_dim)


def score_flops(model: ModelConfig) -> int:
    """The indexer's score of one pair: a product a head, and their weighted sum."""
    return 2 * model.index_n_heads * (model.index_head_dim + 1)


def score_gradient_flops(model: ModelConfig) -> int:
    """Gradients of one score in query, key and head weight."""
    return 2 * model.index_n_heads * (2 * model.index_head_dim + 1)


def row_flops(model: ModelConfig, stage: Stage, row: Row, *, mtp: bool = True, backward: bool = True) -> dict[str, int]:
    """A packed row's forward, and backward if asked for, under `stage`, by part: linear (projections, experts, router),
    head, attention, index_linear, index_scores. `mtp` False leaves the MTP modules out, as RL does."""
    tokens, seen = sum(row.lengths), visible_pairs(row.lengths)
    chosen = selected_pairs(row.lengths, model.index_topk)
    with_mtp = mtp and model.num_mtp_layers > 0 and (stage.lm_loss or stage.indexer_loss is not None)
    layers = model.num_hidden_layers + (model.num_mtp_layers if with_mtp else 0)
    trunk = 3 if backward and stage.trunk_grad and stage.trains_trunk else 1
    learns = backward and stage.trains_indexer and stage.indexer_loss is not None
    weights = layer_weights(model) + (mtp_weights(model) if with_mtp else 0)
    targets = (row.targets + (row.mtp_targets if with_mtp else 0)) if stage.lm_loss else 0
    pairs = chosen if stage.attention == "sparse" else seen
    runs_indexer = stage.attention == "sparse" or stage.indexer_loss is not None
    scores = score_flops(model) * seen
    if learns:
        scores += score_gradient_flops(model) * (chosen if stage.indexer_loss == "selected" else seen)
    return {
        "linear": 2 * weights * tokens * trunk,
        "head": 2 * head_weights(model) * targets * trunk,
        "attention": layers * pair_flops(model, stage.attention) * pairs * trunk,
        "index_linear": layers * 2 * indexer_weights(model) * tokens * (2 if learns else 1) if runs_indexer else 0,
        "index_scores": layers * scores if runs_indexer else 0,
    }


def sampler_flops(model: ModelConfig, attention: str, start: int, stop: int, draws: int) -> dict[str, int]:
    """What the sampler (model/generate.py) needs to run positions [start, stop) of one sample on top of its cache, and
    to draw `draws` tokens: a prompt is (0, P, 0), one decode step (p, p + 1, 1). Parts: as `row_flops`.

    Absorbed throughout; past index_topk a row scores the whole cache and reads k of it.
    """
    layers, topk = model.num_hidden_layers, model.index_topk
    before, after = (start,), (stop,)
    seen = visible_pairs(after) - visible_pairs(before)
    pairs, scored = seen, 0
    if attention == "sparse":
        pairs = selected_pairs(after, topk) - selected_pairs(before, topk)
        scored = seen - visible_pairs((min(stop, topk),)) + visible_pairs((min(start, topk),))
    return {
        "linear": 2 * layer_weights(model) * (stop - start),
        "head": 2 * head_weights(model) * draws,
        "attention": layers * pair_flops(model, "sparse") * pairs,
        "index_linear": layers * 2 * indexer_weights(model) * (stop - start),
        "index_scores": layers * score_flops(model) * scored,
    }


def flops_per_token(model: ModelConfig, stage: Stage, seq_len: int) -> float:
    """Forward and backward of one token of a sequence of `seq_len` that is one document, every token a target."""
    return sum(row_flops(model, stage, Row((seq_len,), seq_len, seq_len)).values()) / seq_len
