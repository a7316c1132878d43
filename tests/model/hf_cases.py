"""Small random models for the Hugging Face tests: transformers' own as oracles, ours, and the checkpoints of both."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from conf.schema import ModelConfig, RopeConfig
from model.hf_config import write_config
from model.transformer import Transformer

VOCAB, T = 64, 48
YARN = RopeConfig(factor=4.0, original_max_position_embeddings=16, beta_fast=8.0, mscale=1.0, mscale_all_dim=0.7)
PLAIN = RopeConfig(theta=500.0)
TOLERANCE = 1e-4  # of logits with a spread of a few units, fp32 on both sides


def make_config(**changes: Any) -> ModelConfig:
    """3 layers (1 dense, 2 MoE), group-limited routing, 16 index heads, topk far below T."""
    base: dict[str, Any] = dict(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, moe_intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
        n_routed_experts=12, n_shared_experts=2, num_experts_per_tok=3, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, first_k_dense_replace=1, max_position_embeddings=64, rms_norm_eps=1e-5,
        num_nextn_predict_layers=0, index_n_heads=16, index_head_dim=16, index_topk=8, rope=YARN,
    )  # fmt: skip
    return ModelConfig(**(base | changes))


@torch.no_grad()
def randomise(net: nn.Module, seed: int = 0) -> None:
    """Unit gain for matrices, norms off the identity, nonzero router biases: nothing may cancel out."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in net.state_dict(keep_vars=True).items():
        noise = torch.randn(tensor.shape, generator=generator)
        if "e_score_correction_bias" in name:
            tensor.copy_(noise * 0.3)
        elif tensor.dim() == 1:
            tensor.copy_(noise * 0.2 + (0.0 if name.endswith("bias") else 1.0))
        else:
            tensor.copy_(noise * tensor.shape[-1] ** -0.5)


def make_net(config: ModelConfig, seed: int = 0) -> Transformer:
    net = Transformer(config)
    randomise(net, seed)
    return net


def make_oracle(config: ModelConfig, kind: str, seed: int = 0) -> nn.Module:
    """transformers' DeepseekV3ForCausalLM (`dense`) or DeepseekV32ForCausalLM (`sparse`) of the same architecture."""
    oracle = oracle_class(kind)(oracle_config(config, kind)).eval()
    randomise(oracle, seed)
    return oracle


def oracle_class(kind: str) -> Any:
    from transformers import DeepseekV3ForCausalLM, DeepseekV32ForCausalLM

    return {"dense": DeepseekV3ForCausalLM, "sparse": DeepseekV32ForCausalLM}[kind]


def oracle_config(config: ModelConfig, kind: str) -> Any:
    from transformers import DeepseekV3Config, DeepseekV32Config

    # eager attention: the fused one sums in another order
    keys = write_config(config, "float32") | {"attn_implementation": "eager"}
    dropped = {"architectures", "model_type", "rope_scaling", "rope_theta", "dtype", "torch_dtype"}
    if kind == "dense":
        dropped |= {key for key in keys if key.startswith("index_")}
    keys = {key: value for key, value in keys.items() if key not in dropped}
    return {"dense": DeepseekV3Config, "sparse": DeepseekV32Config}[kind](**keys)


def random_ids(batch: int = 2, seed: int = 3) -> Tensor:
    return torch.randint(0, VOCAB, (batch, T), generator=torch.Generator().manual_seed(seed))


def stable_topk(scores: Tensor, k: int, dim: int = -1) -> Any:
    """Largest first, ties to the lowest index: what torch's topk leaves open."""
    values, indices = scores.sort(dim=dim, descending=True, stable=True)
    return torch.return_types.topk((values[..., :k], indices[..., :k]))


@contextmanager
def watched_indexer(stable: bool = False):
    """Yields a list that collects the index scores [B, T, T] from which transformers' indexers select; under
    `stable` they select by a stable sort."""
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer

    seen: list[Tensor] = []
    forward, topk = DeepseekV32Indexer.forward, torch.Tensor.topk

    def selecting(scores: Tensor, k: int, dim: int = -1) -> Any:
        seen.append(scores)
        return stable_topk(scores, k, dim) if stable else topk(scores, k, dim=dim)

    def watched(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        with patch.object(torch.Tensor, "topk", selecting):
            return forward(self, *args, **kwargs)

    with patch.object(DeepseekV32Indexer, "forward", watched):
        yield seen


def border_gaps(scores: Tensor, k: int) -> Tensor:
    """Difference of the k-th and the next score, of the largest score, for every row with more than k candidates."""
    ordered = scores.sort(dim=-1, descending=True).values
    finite = ordered > torch.finfo(torch.float32).min / 2  # transformers masks with the smallest float
    kept, first_out = ordered[..., k - 1], ordered[..., k]
    return (kept - first_out)[finite[..., k]] / ordered[finite].abs().max()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors folder, by safetensors' own reader."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """A single-file checkpoint, by safetensors' own writer."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
