"""The smallest model that has every part (MoE, MTP, indexer), and packed batches for it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from conf.schema import ModelConfig
from model import Transformer

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    index_n_heads=4,
    index_head_dim=16,
    index_topk=4,
    max_position_embeddings=128,
    initializer_range=0.1,
)


def build(**changes: int) -> Transformer:
    net = Transformer(replace(MODEL, **changes))  # type: ignore[arg-type]
    net.init_weights(0)
    return net


def batch(index: int, length: int = 16) -> dict[str, Tensor]:
    """Two documents and three rows of padding, drawn from `index` alone."""
    generator = torch.Generator().manual_seed(1000 + index)
    ids = torch.randint(0, MODEL.vocab_size, (length,), generator=generator)
    cut = 5 + index % 4
    doc_start = torch.zeros(length, dtype=torch.int64)
    doc_start[cut:] = cut
    doc_start[-3:] = length
    rows = torch.arange(length)
    real = doc_start <= rows
    shifted, twice = ids.roll(-1), ids.roll(-2)
    last = (doc_start.roll(-1) != doc_start) | (rows == length - 1)
    labels = torch.where(real & ~last, shifted, -100)
    before_last = last | last.roll(-1)
    mtp_labels = torch.where(real & ~before_last, twice, -100)
    return {
        "input_ids": ids,
        "next_ids": torch.where(labels >= 0, shifted, 0),
        "labels": labels,
        "mtp_labels": mtp_labels,
        "positions": torch.where(real, rows - doc_start, 0),
        "doc_start": doc_start,
    }
