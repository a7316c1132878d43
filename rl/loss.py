"""The GRPO objective of DeepSeek-V3.2 (arXiv 2512.02556, eqs. 5, 7-9) as a pure function of flat, packed token tensors.

    L = -1/N sum_i 1/|o_i| sum_t [ M_it min(r_it A_it, clip(r_it, 1 - eps_low, 1 + eps_high) A_it) - beta k_it ]
    r_it = pi_theta / pi_old        pi_old: the log-prob the sampler returned (no recompute by the trainer)
    k_it = r_it (pi_ref / pi_theta - log(pi_ref / pi_theta) - 1)
    M_it = 0 where A_it < 0 and 1/|o_i| sum_t log(pi_old / pi_theta) > delta, else 1        (surrogate only, not the KL)

The ratio inside k stays differentiable: only then are both the value and the gradient those of KL(pi_theta ||
pi_ref); detached, the gradient is the forward KL's. Departs from the paper in nothing; separate clip bounds and
`delta=None` are options.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossSettings:
    """eps_low, eps_high, beta and delta of the head's formulas; delta None switches M off."""

    clip_low: float
    clip_high: float
    beta: float = 0.0
    off_policy_delta: float | None = None


@dataclass(frozen=True)
class PolicyTokens:
    """Flat columns [T] of one packed row. Tokens with `sequence` -1 (prompts, padding) take no part."""

    logprobs: Tensor  # log pi_theta, differentiable
    behaviour: Tensor  # log pi_old
    advantages: Tensor
    sequence: Tensor  # int64: number of the sequence inside this row, or -1
    num_sequences: int  # sequences of this row
    reference: Tensor | None = None  # log pi_ref; needed where beta > 0


def k3(log_ratio: Tensor) -> Tensor:
    """exp(x) - x - 1: Schulman's non-negative estimator of a KL from x = log(other / sampling distribution)."""
    return torch.expm1(log_ratio) - log_ratio


def grpo_loss(tokens: PolicyTokens, settings: LossSettings, total_sequences: int) -> tuple[Tensor, dict[str, Tensor]]:
    """-> (loss, metrics), each a share of a mean over `total_sequences` (N, of all rows and ranks): shares simply add
    up.

    Metrics are means over sequences of per-sequence means: `policy/clip_frac` (tokens whose surrogate is clipped and
    gives no gradient), `policy/ratio_mean`, `policy/kl_ref` (where there is a reference),
    `policy/off_policy_masked_frac` (sequences), `mismatch/k3` (KL of the sampler to the current policy; at the first
    mini-batch that of sampler against trainer).
    """
    if settings.beta > 0 and tokens.reference is None:
        raise ValueError(f"beta={settings.beta} needs reference log-probs: pass PolicyTokens.reference")
    drawn = (tokens.sequence >= 0).nonzero().squeeze(1)
    sequence = tokens.sequence[drawn]
    lengths = torch.bincount(sequence, minlength=tokens.num_sequences).clamp(min=1)

    def sequence_means(values: Tensor) -> Tensor:
        """[drawn tokens] -> [sequences]: sum over the sequence / |o_i|."""
        return values.new_zeros(tokens.num_sequences).index_add(0, sequence, values) / lengths

    def share(values: Tensor) -> Tensor:
        """[drawn tokens] -> this row's share of the mean over all sequences."""
        return sequence_means(values).sum() / total_sequences

    logprobs, behaviour, advantages = tokens.logprobs[drawn], tokens.behaviour[drawn], tokens.advantages[drawn]
    log_ratio = logprobs - behaviour
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high) * advantages
    surrogate = torch.minimum(ratio * advantages, clipped)

    with torch.no_grad():
        is_clipped = (clipped < ratio * advantages).to(ratio.dtype)
        masked = torch.zeros_like(lengths, dtype=torch.bool)
        if settings.off_policy_delta is not None:
            stale = sequence_means(-log_ratio) > settings.off_policy_delta
            masked = stale & (sequence_means((advantages < 0).to(ratio.dtype)) > 0)  # A is one number a sequence
        metrics = {
            "policy/clip_frac": share(is_clipped),
            "policy/ratio_mean": share(ratio),
            "policy/off_policy_masked_frac": masked.sum() / total_sequences,
            "mismatch/k3": share(k3(log_ratio)),
        }

    objective = torch.where(masked[sequence], torch.zeros_like(surrogate), surrogate)
    if tokens.reference is not None:
        kl = ratio * k3(tokens.reference[drawn] - logprobs)
        metrics["policy/kl_ref"] = share(kl.detach())
        objective = objective - settings.beta * kl if settings.beta > 0 else objective
    return -share(objective), metrics
