"""The tensors of a DeepSeek-V3.2 checkpoint as DeepSeek publishes one, from the values of its config.json alone.

Written down from the public index (tests/model/deepseek_v3_2.json) and from the architecture, and not from this
package's modules, so that a checkpoint that these wrote can be held against it. Names on the left, dtypes as
safetensors spells them; an FP8 weight has the scales of its 128x128 blocks beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from conf.schema import ModelConfig

BLOCK = 128
SCALES = "_scale_inv"
FP8, BF16, F32 = "F8_E4M3", "BF16", "F32"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Published:
    """Dtype and shape of a tensor."""

    dtype: str
    shape: Shape


def published(config: ModelConfig) -> dict[str, Published]:
    """Name -> tensor, of the FP8 checkpoint; MTP layers and the copies that they carry included."""
    found: dict[str, Published] = {}
    for name, dtype, shape in _tensors(config):
        found[name] = Published(dtype, shape)
        if dtype == FP8:
            found[name + SCALES] = Published(F32, tuple(-(-size // BLOCK) for size in shape))
    return found


def _tensors(c: ModelConfig) -> Iterator[tuple[str, str, Shape]]:
    hidden, last = c.hidden_size, c.num_hidden_layers
    vocabulary = (c.vocab_size, hidden)
    yield "model.embed_tokens.weight", BF16, vocabulary
    yield "model.norm.weight", F32, (hidden,)
    yield "lm_head.weight", BF16, vocabulary
    for i in range(last + c.num_mtp_layers):
        layer = f"model.layers.{i}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{name}.weight", F32, (hidden,)
        yield from _attention(f"{layer}.self_attn", c)
        if i < c.first_k_dense_replace:
            yield from _mlp(f"{layer}.mlp", hidden, c.intermediate_size)
        else:
            yield from _moe(f"{layer}.mlp", c)
    for i in range(last, last + c.num_mtp_layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.embed_tokens.weight", BF16, vocabulary
        yield f"{layer}.shared_head.head.weight", BF16, vocabulary
        yield f"{layer}.eh_proj.weight", BF16, (hidden, 2 * hidden)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            yield f"{layer}.{name}.weight", F32, (hidden,)


def _attention(name: str, c: ModelConfig) -> Iterator[tuple[str, str, Shape]]:
    heads, hidden, index = c.num_attention_heads, c.hidden_size, f"{name}.indexer"
    yield f"{name}.q_a_proj.weight", FP8, (c.q_lora_rank, hidden)
    yield f"{name}.q_a_layernorm.weight", F32, (c.q_lora_rank,)
    yield f"{name}.q_b_proj.weight", FP8, (heads * (c.qk_nope_head_dim + c.qk_rope_head_dim), c.q_lora_rank)
    yield f"{name}.kv_a_proj_with_mqa.weight", FP8, (c.kv_lora_rank + c.qk_rope_head_dim, hidden)
    yield f"{name}.kv_a_layernorm.weight", F32, (c.kv_lora_rank,)
    yield f"{name}.kv_b_proj.weight", FP8, (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
    yield f"{name}.o_proj.weight", FP8, (hidden, heads * c.v_head_dim)
    yield f"{index}.wq_b.weight", FP8, (c.index_n_heads * c.index_head_dim, c.q_lora_rank)
    yield f"{index}.wk.weight", FP8, (c.index_head_dim, hidden)
    yield f"{index}.weights_proj.weight", BF16, (c.index_n_heads, hidden)
    for part in ("weight", "bias"):
        yield f"{index}.k_norm.{part}", F32, (c.index_head_dim,)


def _moe(name: str, c: ModelConfig) -> Iterator[tuple[str, str, Shape]]:
    yield f"{name}.gate.weight", BF16, (c.n_routed_experts, c.hidden_size)
    yield f"{name}.gate.e_score_correction_bias", F32, (c.n_routed_experts,)
    yield from _mlp(f"{name}.shared_experts", c.hidden_size, c.n_shared_experts * c.moe_intermediate_size)
    for e in range(c.n_routed_experts):
        yield from _mlp(f"{name}.experts.{e}", c.hidden_size, c.moe_intermediate_size)


def _mlp(name: str, hidden: int, inner: int) -> Iterator[tuple[str, str, Shape]]:
    for part in ("gate_proj", "up_proj"):
        yield f"{name}.{part}.weight", FP8, (inner, hidden)
    yield f"{name}.down_proj.weight", FP8, (hidden, inner)
