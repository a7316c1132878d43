"""The dense warm-up loss by brute force: KL(p || softmax(I)) over every visible position.

DeepSeek-V3.2 report (arXiv 2512.02556), eq. 3. p[t,:] is the attention of all heads summed and L1-normalised; each
head's softmax sums to one, so that is their mean. p is a constant: gradients reach q_index, k_index and w only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.ops.index_topk.reference import index_scores, select_topk, visible
from model.ops.mla_dense.reference import attention_probs


class KLResult(NamedTuple):
    """Per row, in nats; a row that sees nothing is 0 throughout. The masses are None where no `topk` was given."""

    kl: Tensor  # [T] KL(p || softmax(I))
    kl_uniform: Tensor  # [T] KL(p || uniform): what an indexer without information scores
    mass: Tensor | None  # [T] sum of p over the index top-k
    oracle_mass: Tensor | None  # [T] sum of the topk largest p
    shared: Tensor | None  # [T] keys that the index top-k and the topk largest p have in common


def kl_rows(p: Tensor, scores: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """p, scores, allowed [T, N] -> [T] KL(p || softmax(scores)) and [T] KL(p || uniform), over the allowed entries."""
    nothing = ~allowed.any(dim=-1, keepdim=True)
    log_student = scores.masked_fill(~(allowed | nothing), float("-inf")).log_softmax(dim=-1)
    log_student = log_student.masked_fill(~allowed, 0.0)  # p is 0 there, and 0 * -inf is not
    negative_entropy = torch.xlogy(p, p).sum(dim=-1)  # 0 log 0 = 0, and no epsilon inside the logarithm
    num_allowed = allowed.sum(dim=-1).clamp(min=1).to(p.dtype)
    kl = negative_entropy - (p * log_student).sum(dim=-1)
    return kl, (negative_entropy + num_allowed.log()).masked_fill(nothing[:, 0], 0.0)


def index_kl_dense(
    q: Tensor,
    k: Tensor,
    scale: float,
    q_index: Tensor,
    k_index: Tensor,
    w: Tensor,
    doc_start: Tensor,
    topk: int | None = None,
) -> KLResult:
    """q, k [T, H, Dqk]; q_index [T, Hi, di], k_index [T, di], w [T, Hi]; doc_start int64 [T] -> KLResult of [T]s."""
    allowed = visible(doc_start)
    with torch.no_grad():
        p = attention_probs(q, k, doc_start, scale).mean(dim=0)  # [T, T]
    scores = index_scores(q_index, k_index, w)
    kl, kl_uniform = kl_rows(p, scores, allowed)
    if topk is None:
        return KLResult(kl, kl_uniform, None, None, None)
    chosen = select_topk(scores.detach(), allowed, topk)
    mass = p.gather(1, chosen.clamp(min=0)).masked_fill(chosen < 0, 0.0).sum(dim=-1)
    oracle_mass = p.topk(min(topk, p.shape[1]), dim=-1).values.sum(dim=-1)
    best = select_topk(p, allowed, topk)
    shared = ((chosen.unsqueeze(2) == best.unsqueeze(1)) & (best >= 0).unsqueeze(1)).sum(dim=(1, 2))
    return KLResult(kl, kl_uniform, mass, oracle_mass, shared)
