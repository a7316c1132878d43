"""A model small enough for a test of milliseconds, with everything on: MoE groups, YaRN, MTP, T > index_topk."""

from __future__ import annotations

import torch
from torch import Tensor

from conf.schema import ModelConfig, RopeConfig
from model import Transformer

CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    index_n_heads=16,
    index_head_dim=16,
    index_topk=6,
    initializer_range=0.2,
    rope=RopeConfig(factor=4.0, original_max_position_embeddings=16),
)


def tiny_net(config: ModelConfig = CONFIG, seed: int = 0) -> Transformer:
    net = Transformer(config)
    net.init_weights(seed)
    for router in net.routers():  # a bias that is not zero, so that choice and gate differ
        router.e_score_correction_bias.copy_(torch.linspace(-0.1, 0.1, config.n_routed_experts))
    return net


def batch(lengths: list[int], padding: int = 0, seed: int = 1) -> dict[str, Tensor]:
    """One packed sequence of random documents of these lengths, padding behind, as `data/packing.py` lays it out."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths) + padding
    fields = {name: torch.zeros(total, dtype=torch.int64) for name in ("input_ids", "next_ids", "positions")}
    fields |= {name: torch.full((total,), -100) for name in ("labels", "mtp_labels")}
    fields["doc_start"] = torch.full((total,), total)
    start = 0
    for length in lengths:
        ids = torch.randint(0, CONFIG.vocab_size, (length,), generator=generator)
        rows = slice(start, start + length)
        fields["input_ids"][rows], fields["doc_start"][rows] = ids, start
        fields["positions"][rows] = torch.arange(length)
        fields["next_ids"][start : start + length - 1] = ids[1:]
        fields["labels"][start : start + length - 1] = ids[1:]
        fields["mtp_labels"][start : start + max(length - 2, 0)] = ids[2:]
        start += length
    return fields
