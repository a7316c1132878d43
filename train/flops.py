"""Model FLOPs of a token, from the configuration alone: what the mathematics asks for, not what a kernel happens to do.

A product of an [n, k] weight with a token costs 2nk. Trained parts cost three times their forward, the rest once. Rows
see T/2 keys on average (one document a sequence), at most k once selected; the indexer looks at all of them, k or not.
"""

from __future__ import annotations

from conf.schema import ModelConfig
from train.stages import Stage


def attention_weights(model: ModelConfig) -> int:
    """Weights of one layer's MLA that a token meets."""
    heads, hidden = model.num_attention_heads, model.hidden_size
    query = hidden * model.q_lora_rank + model.q_lora_rank * heads * model.qk_head_dim
    latent = hidden * (model.kv_lora_rank + model.qk_rope_head_dim)
    up = model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    return query + latent + up + heads * model.v_head_dim * hidden


def indexer_weights(model: ModelConfig) -> int:
    queries = model.q_lora_rank * model.index_n_heads * model.index_head_dim
    return queries + model.hidden_size * (model.index_head_dim + model.index_n_heads)


def trunk_weights(model: ModelConfig) -> int:
    """Weights outside the indexer that one token meets: active experts, the head, and MTP's own layer and head."""
    hidden = model.hidden_size
    active = model.num_experts_per_tok + model.n_shared_experts
    moe = 3 * hidden * model.moe_intermediate_size * active + hidden * model.n_routed_experts
    dense = 3 * hidden * model.intermediate_size
    first = min(model.first_k_dense_replace, model.num_hidden_layers)
    mlps = first * dense + (model.num_hidden_layers - first) * moe
    layers = model.num_hidden_layers * attention_weights(model) + mlps
    mtp = attention_weights(model) + moe + 2 * hidden * hidden + hidden * model.vocab_size
    return layers + hidden * model.vocab_size + model.num_mtp_layers * mtp


def flops_per_token(model: ModelConfig, stage: Stage, seq_len: int) -> float:
    """Forward and backward of one token in a sequence of `seq_len` under `stage`."""
    layers = model.num_hidden_layers + model.num_mtp_layers
    seen = seq_len / 2
    heads = model.num_attention_heads
    if stage.attention == "dense":
        core = 2 * heads * (model.qk_head_dim + model.v_head_dim) * seen
    else:
        width = 2 * model.kv_lora_rank + model.qk_rope_head_dim
        core = 2 * heads * width * min(model.index_topk, seen)
    runs_indexer = stage.attention == "sparse" or stage.indexer_loss is not None
    scoring = 2 * model.index_n_heads * model.index_head_dim * seen
    indexer = layers * (2 * indexer_weights(model) + scoring) if runs_indexer else 0.0
    trunk = 2 * trunk_weights(model) + layers * core
    return trunk * (3 if stage.trunk_grad and stage.trains_trunk else 1) + indexer * (3 if stage.indexer_loss else 1)
