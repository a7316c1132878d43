"""The table ours <-> Hugging Face: which tensors of a checkpoint make which parameter, their shapes and dtypes.

    ours                                    Hugging Face
    lm_head.weight                          lm_head.weight
    layers.3.self_attn.q_a_proj.weight      model.layers.3.self_attn.q_a_proj.weight      (all but the rows below)
    layers.3.mlp.experts.w1[e] (w3, w2)     model.layers.3.mlp.experts.{e}.gate_proj.weight (up_proj, down_proj)
    mtp.0.layer.X                           model.layers.{N}.X                            N = num_hidden_layers
    mtp.0.{enorm,hnorm,eh_proj}.weight      model.layers.{N}.{enorm,hnorm,eh_proj}.weight
    mtp.0.norm.weight                       model.layers.{N}.shared_head.norm.weight
    embed_tokens, lm_head once more         model.layers.{N}.{embed_tokens,shared_head.head}.weight

The last row are copies that DeepSeek's files carry: read for their shape alone, written again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from conf.schema import ModelConfig

EXPERT_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
MTP_NAMES = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "shared_head.norm"}
# These decide choices (experts, tokens), where rounding flips results: they stay fp32 in fp32 and bf16 models. In the
# FP8 format they are what DeepSeek publishes there: norms and router biases fp32, router and weights_proj bf16.
_KEPT_FP32 = (".mlp.gate.weight", ".e_score_correction_bias", ".indexer.weights_proj.weight", ".indexer.k_norm.")
_FP32_BESIDE_FP8 = ("norm.weight", ".k_norm.bias", ".e_score_correction_bias")
# What DeepSeek stores in FP8: embedding, head, norms, router, weights_proj and eh_proj are not.
_FP8_WEIGHTS = tuple(
    f".{name}.weight"
    for name in (
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        *("indexer.wq_b", "indexer.wk", "gate_proj", "up_proj", "down_proj"),
    )
)


@dataclass(frozen=True)
class Slot:
    """One tensor of a checkpoint: its name there, the parameter or buffer of ours, the expert within it (or None)."""

    hf_name: str
    ours: str
    expert: int | None
    shape: tuple[int, ...]
    is_copy: bool = False

    @property
    def is_indexer(self) -> bool:
        return ".indexer." in self.ours


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What the tensor of this name (ours or Hugging Face's) has in memory and on disk when the model has `dtype`.

    In an FP8 checkpoint (float8_e4m3fn; Hugging Face's names) every dtype is DeepSeek-V3.2's (model/hf_index.py).
    """
    if dtype == torch.float8_e4m3fn:
        kept = torch.float32 if name.endswith(_FP32_BESIDE_FP8) else torch.bfloat16
        return dtype if name.endswith(_FP8_WEIGHTS) else kept
    if any(part in name for part in _KEPT_FP32):
        return torch.float32
    return dtype


def hf_name(ours: str, num_hidden_layers: int) -> str:
    """The checkpoint's name of one of our tensors; for 3-D experts with `{}` in the expert's place."""
    if ours.startswith("lm_head."):
        return ours
    if ours.startswith("mtp."):
        _, j, rest = ours.split(".", 2)
        block, _, leaf = rest.partition(".")
        inner = leaf if block == "layer" else f"{MTP_NAMES[block]}.{leaf}"
        ours = f"layers.{num_hidden_layers + int(j)}.{inner}"
    stem, _, last = ours.rpartition(".")
    if stem.endswith(".mlp.experts"):
        ours = f"{stem}.{{}}.{EXPERT_NAMES[last]}.weight"
    return f"model.{ours}"


def slots(net: nn.Module, config: ModelConfig) -> list[Slot]:
    """Every tensor of the checkpoint of `net` (which may be on the meta device), in the order in which files are
    written."""
    found = []
    layers = config.num_hidden_layers
    for ours, tensor in net.state_dict(keep_vars=True).items():
        name, shape = hf_name(ours, layers), tuple(tensor.shape)
        if "{}" not in name:
            found.append(Slot(name, ours, None, shape))
            continue
        found += [Slot(name.format(e), ours, e, shape[1:]) for e in range(config.n_routed_experts)]
    vocabulary = (config.vocab_size, config.hidden_size)
    for j in range(config.num_mtp_layers):
        prefix = f"model.layers.{layers + j}"
        found.append(Slot(f"{prefix}.embed_tokens.weight", "embed_tokens.weight", None, vocabulary, is_copy=True))
        found.append(Slot(f"{prefix}.shared_head.head.weight", "lm_head.weight", None, vocabulary, is_copy=True))
    return found


def is_ignored(name: str, config: ModelConfig) -> bool:
    """Tensors of a checkpoint that hold nothing for this model: rotary tables, and MTP layers that are dropped."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    first = config.num_hidden_layers + config.num_mtp_layers
    last = config.num_hidden_layers + config.num_nextn_predict_layers
    return any(name.startswith(f"model.layers.{i}.") for i in range(first, last))
