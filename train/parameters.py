"""Every parameter of a model as data, from the configuration alone: what memory and communication are counted from.

tests/train/test_parameters.py holds names and shapes against the model's own. Sizes are counts of values, not bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from conf.schema import ModelConfig
from train.stages import Stage


@dataclass(frozen=True)
class Parameter:
    """`layer`: number of the layer that holds it, MTP's behind the main ones, None outside them."""

    name: str
    shape: tuple[int, ...]
    layer: int | None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_expert(self) -> bool:
        return ".experts." in self.name

    @property
    def is_indexer(self) -> bool:
        return ".indexer." in self.name

    def trains(self, stage: Stage) -> bool:
        return stage.trains_indexer if self.is_indexer else stage.trains_trunk


def attention_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """MLA with its indexer."""
    heads, hidden = model.num_attention_heads, model.hidden_size
    query, latent, index = model.q_lora_rank, model.kv_lora_rank, model.index_head_dim
    return {
        "q_a_proj.weight": (query, hidden),
        "q_a_layernorm.weight": (query,),
        "q_b_proj.weight": (heads * model.qk_head_dim, query),
        "kv_a_proj_with_mqa.weight": (latent + model.qk_rope_head_dim, hidden),
        "kv_a_layernorm.weight": (latent,),
        "kv_b_proj.weight": (heads * (model.qk_nope_head_dim + model.v_head_dim), latent),
        "o_proj.weight": (hidden, heads * model.v_head_dim),
        "indexer.wq_b.weight": (model.index_n_heads * index, query),
        "indexer.wk.weight": (index, hidden),
        "indexer.k_norm.weight": (index,),
        "indexer.k_norm.bias": (index,),
        "indexer.weights_proj.weight": (model.index_n_heads, hidden),
    }


def _mlp(hidden: int, inner: int, prefix: str = "") -> dict[str, tuple[int, ...]]:
    up = (inner, hidden)
    return {f"{prefix}gate_proj.weight": up, f"{prefix}up_proj.weight": up, f"{prefix}down_proj.weight": up[::-1]}


def moe_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    experts, hidden, inner = model.n_routed_experts, model.hidden_size, model.moe_intermediate_size
    found: dict[str, tuple[int, ...]] = {"gate.weight": (experts, hidden)}
    for name in ("w1", "w2", "w3"):
        found[f"experts.{name}"] = (experts, hidden, inner) if name == "w2" else (experts, inner, hidden)
    return found | _mlp(hidden, inner * model.n_shared_experts, "shared_experts.")


@cache
def parameters(model: ModelConfig) -> tuple[Parameter, ...]:
    """All of the model's."""
    hidden, vocab, layers = model.hidden_size, model.vocab_size, model.num_hidden_layers

    def layer(prefix: str, number: int, moe: bool) -> list[Parameter]:
        mlp = moe_shapes(model) if moe else _mlp(hidden, model.intermediate_size)
        shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
        shapes |= {f"self_attn.{name}": shape for name, shape in attention_shapes(model).items()}
        shapes["post_attention_layernorm.weight"] = (hidden,)
        shapes |= {f"mlp.{name}": shape for name, shape in mlp.items()}
        return [Parameter(prefix + name, shape, number) for name, shape in shapes.items()]

    found = [Parameter("embed_tokens.weight", (vocab, hidden), None)]
    for number in range(layers):
        found += layer(f"layers.{number}.", number, number >= model.first_k_dense_replace)
    found += [Parameter("norm.weight", (hidden,), None), Parameter("lm_head.weight", (vocab, hidden), None)]
    for i in range(model.num_mtp_layers):
        own = {"enorm.weight": (hidden,), "hnorm.weight": (hidden,), "eh_proj.weight": (hidden, 2 * hidden)}
        found += [Parameter(f"mtp.{i}.{name}", shape, layers + i) for name, shape in own.items()]
        found += layer(f"mtp.{i}.layer.", layers + i, True)
        found.append(Parameter(f"mtp.{i}.norm.weight", (hidden,), layers + i))
    return tuple(found)


@dataclass(frozen=True)
class Counts:
    """Values of the whole model: `total` with MTP, `active` those that one token meets (main layers and head, without
    MTP and the embedding's other rows), `indexer` of all layers, `experts` routed."""

    total: int
    active: int
    indexer: int
    experts: int
    mtp: int


def counts(model: ModelConfig) -> Counts:
    found = parameters(model)
    main = [p for p in found if p.layer is None or p.layer < model.num_hidden_layers]
    share = model.num_experts_per_tok / model.n_routed_experts
    active = sum(int(p.size * share) if p.is_expert else p.size for p in main if p.name != "embed_tokens.weight")
    return Counts(
        total=sum(p.size for p in found),
        active=active + model.hidden_size,
        indexer=sum(p.size for p in found if p.is_indexer),
        experts=sum(p.size for p in found if p.is_expert),
        mtp=sum(p.size for p in found) - sum(p.size for p in main),
    )
