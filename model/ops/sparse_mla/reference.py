"""Absorbed MLA over selected positions by brute force: a [T, T] mask made from the indices, then dense attention.

One latent row per token serves as key (all of it) and as value (its first `value_dim` columns) for every head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.mla_dense.reference import masked_softmax


def selected_mask(idx: Tensor, num_keys: int) -> Tensor:
    """idx [T, k] (-1: none) -> bool [T, num_keys], true where a position is selected."""
    mask = torch.zeros(idx.shape[0], num_keys + 1, dtype=torch.bool, device=idx.device)
    mask.scatter_(1, idx.masked_fill(idx < 0, num_keys).long(), True)  # -1 lands in a column that is cut off
    return mask[:, :num_keys]


def sparse_mla(q: Tensor, kv: Tensor, idx: Tensor, scale: float, value_dim: int) -> tuple[Tensor, Tensor]:
    """q [T, H, Dc+Dr], kv [T, Dc+Dr], idx [T, k] -> out [T, H, Dc = value_dim], lse [T, H] (nats).

    A row that selects nothing gives out 0 and lse -inf.
    """
    mask = selected_mask(idx, kv.shape[0])[:, None, :]  # [T, 1, T]
    logits = torch.einsum("thd,sd->ths", q, kv) * scale
    out = torch.einsum("ths,sv->thv", masked_softmax(logits, mask), kv[:, :value_dim])
    nothing = ~mask.any(dim=-1)  # [T, 1]
    lse = logits.masked_fill(~(mask | nothing[..., None]), float("-inf")).logsumexp(dim=-1)
    return out, lse.masked_fill(nothing, float("-inf"))
