"""The GRPO objective of DeepSeek-V3.2 (arXiv 2512.02556, eqs. 5, 7-9) as pure functions of flat, packed token tensors.

    L    = -sum_i sum_t c_i [ M_i w_it min(r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i) - beta_i k_it ]
    c_i  = 1 / (N |o_i|): a mean a sequence, then over the N sequences (eq. 5); or, where `loss_mean` is token,
           1 / sum_j |o_j|: one mean over all tokens (DAPO, arXiv 2503.14476, eq. 8)
    r_it = pi_theta / pi_old
    w_it = min(pi_old / pi_sampler, C), a constant of the gradient; 1 where C is None
    k_it = pi_theta / pi_sampler (pi_ref / pi_theta - log(pi_ref / pi_theta) - 1)
    M_i  = 0 where A_i < 0 and d_i > delta, else 1;  d_i = 1/|o_i| sum_t log(pi_sampler / pi_theta)

pi_sampler is what the rollout engine returned for the token it drew. pi_old is either that same number, and then there
is no w (DeepSeek-V3.2's text has one symbol for both); or the trainer's own log-prob from before the iteration's first
step. Then r and its clip see the trainer's steps alone, and how far the trainer is from the sampler enters as the
truncated weight w: pi_theta / pi_sampler = r w while C does not bind.

The ratio inside k stays differentiable and is always over pi_sampler, which drew the token: only then are both the
value and the gradient those of KL(pi_theta || pi_ref); detached, the gradient is the forward KL's. `kl_estimator` k3
leaves the ratio out, as DeepSeekMath and R1 do. M and w act on the surrogate alone.

A sample may come as several sequences, one behind each point where its context began anew: |o_i| and N count whole
samples, d_i is of each sequence.

Where the sampler's log-prob is missing (NaN), the token gives d_i nothing, as in TRL, and the sampler counts as pi_old,
or where pi_old is the sampler's, as the current policy: a weight or a ratio of 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossSettings:
    """eps_low, eps_high, delta, C and the kind of mean of the head's formulas; None switches M or w off."""

    clip_low: float
    clip_high: float
    off_policy_delta: float | None = None
    importance_cap: float | None = None
    loss_mean: str = "sequence"  # sequence | token
    kl_estimator: str = "unbiased"  # unbiased | k3: without the ratio


@dataclass(frozen=True)
class Totals:
    """What a whole mini-batch holds, over all rows and ranks: N samples and sum_i |o_i|."""

    sequences: int
    tokens: int


@dataclass(frozen=True)
class PolicyTokens:
    """Flat columns [T] of one packed row. Tokens with `sequence` -1 (prompts, padding) take no part."""

    logprobs: Tensor  # log pi_theta, differentiable
    behaviour: Tensor  # log pi_sampler; NaN where the sampler gave none
    advantages: Tensor
    sequence: Tensor  # int64: number of the sequence inside this row, or -1
    num_sequences: int  # sequences of this row
    reference: Tensor | None = None  # log pi_ref
    beta: Tensor | None = None  # [num_sequences] strength of the KL to the reference; None: no such term
    old: Tensor | None = None  # log pi_old of the trainer; None: the sampler's is pi_old
    lengths: Tensor | None = None  # [num_sequences] |o_i| of each one's whole sample; None: each is a whole sample


@dataclass(frozen=True)
class Seen:
    """What the loss saw of the n drawn tokens, in their order, and of each sequence; no gradient, for people."""

    sequence: Tensor  # [n]
    logprobs: Tensor  # [n] log pi_theta
    ratio: Tensor  # [n] r
    clipped: Tensor  # [n] bool: the clip took the gradient
    masked: Tensor  # [n] bool: M = 0
    off_policy_kl: Tensor  # [num_sequences] d
    reference_kl: Tensor | None  # [num_sequences] mean k


class PolicyLoss(NamedTuple):
    """`loss` and `metrics` are the share of these tokens in the mini-batch's: shares simply add up."""

    loss: Tensor
    metrics: dict[str, Tensor]
    seen: Seen


def k3(log_ratio: Tensor) -> Tensor:
    """exp(x) - x - 1: Schulman's non-negative estimator of a KL from x = log(other / sampling distribution)."""
    return torch.expm1(log_ratio) - log_ratio


def sequence_means(values: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """values [T] of tokens, sequence [T] -> [num_sequences]: 1/|o_i| sum_t values_it; 0 for one without tokens."""
    inside = (sequence >= 0).nonzero().squeeze(1)
    at = sequence[inside]
    sums = values.new_zeros(num_sequences).index_add(0, at, values[inside])
    return sums / torch.bincount(at, minlength=num_sequences).clamp(min=1)


def sampler_gap(tokens: PolicyTokens) -> Tensor:
    """[T] log(pi_sampler / pi_theta) without gradient; 0 where the sampler gave no log-prob."""
    return (tokens.behaviour - tokens.logprobs.detach()).masked_fill(tokens.behaviour.isnan(), 0.0)


def off_policy_kl(tokens: PolicyTokens) -> Tensor:
    """[num_sequences] d_i, the measure of eq. 9: how far each sequence is from what its sampler would still draw."""
    return sequence_means(sampler_gap(tokens), tokens.sequence, tokens.num_sequences)


def grpo_loss(tokens: PolicyTokens, settings: LossSettings, totals: Totals) -> PolicyLoss:
    """The loss of these tokens, with what it saw of each.

    Metrics are means over sequences of per-sequence means: `policy/clip_frac` (tokens whose surrogate is clipped and
    gives no gradient), `policy/ratio_mean`, `policy/kl_ref` (where there is a reference),
    `policy/off_policy_masked_frac` (sequences), `policy/importance_mean` and `policy/importance_capped_frac` (where
    there is a C), `mismatch/k3` (KL of the sampler to the current policy; at the first mini-batch that of sampler
    against trainer).
    """
    if tokens.beta is not None and tokens.reference is None:
        raise ValueError("a KL to the reference needs its log-probs: pass PolicyTokens.reference beside beta")
    if settings.importance_cap is not None and tokens.old is None:
        raise ValueError(f"importance_cap={settings.importance_cap} needs pi_old of the trainer: pass PolicyTokens.old")
    drawn = (tokens.sequence >= 0).nonzero().squeeze(1)
    sequence = tokens.sequence[drawn]
    own_lengths = torch.bincount(sequence, minlength=tokens.num_sequences).clamp(min=1)
    lengths = own_lengths if tokens.lengths is None else tokens.lengths

    def per_sequence(values: Tensor) -> Tensor:
        """[drawn tokens] -> sums over each sequence."""
        return values.new_zeros(tokens.num_sequences).index_add(0, sequence, values)

    def share(values: Tensor) -> Tensor:
        """[drawn tokens] -> their share of the mean over all samples of means over a sample."""
        return (per_sequence(values) / lengths).sum() / totals.sequences

    logprobs, behaviour, advantages = tokens.logprobs[drawn], tokens.behaviour[drawn], tokens.advantages[drawn]
    sampler = torch.where(behaviour.isnan(), logprobs.detach() if tokens.old is None else tokens.old[drawn], behaviour)
    old = sampler if tokens.old is None else tokens.old[drawn]
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high) * advantages
    surrogate = torch.minimum(ratio * advantages, clipped)

    with torch.no_grad():
        drift, is_clipped = off_policy_kl(tokens), clipped < ratio * advantages
        masked = torch.zeros_like(advantages, dtype=torch.bool)
        if settings.off_policy_delta is not None:
            masked = (drift > settings.off_policy_delta)[sequence] & (advantages < 0)
        metrics = {
            "policy/clip_frac": share(is_clipped.to(ratio.dtype)),
            "policy/ratio_mean": share(ratio),
            "policy/off_policy_masked_frac": share(masked.to(ratio.dtype)),
            "mismatch/k3": share(k3(-sampler_gap(tokens)[drawn])),
        }
        if settings.importance_cap is not None:
            weight = (old - sampler).exp()
            metrics["policy/importance_capped_frac"] = share((weight > settings.importance_cap).to(ratio.dtype))
            weight = weight.clamp(max=settings.importance_cap)
            metrics["policy/importance_mean"] = share(weight)

    if settings.importance_cap is not None:
        surrogate = weight * surrogate
    objective = torch.where(masked, torch.zeros_like(surrogate), surrogate)
    reference_kl = None
    if tokens.reference is not None:
        drift_of_reference = tokens.reference[drawn] - logprobs
        weight = (logprobs - sampler).exp() if settings.kl_estimator == "unbiased" else torch.ones_like(logprobs)
        drifted = (weight * k3(drift_of_reference)).detach()
        reference_kl = per_sequence(drifted) / own_lengths
        metrics["policy/kl_ref"] = share(drifted)
        if tokens.beta is not None:
            strength = tokens.beta[sequence]
            # a KL without strength may be infinite, and 0 times that is no 0
            kl = weight * k3(torch.where(strength > 0, drift_of_reference, torch.zeros_like(drift_of_reference)))
            objective = objective - strength * kl
    mean = share(objective) if settings.loss_mean == "sequence" else objective.sum() / totals.tokens
    seen = Seen(sequence, logprobs.detach(), ratio.detach(), is_clipped, masked, drift, reference_kl)
    return PolicyLoss(-mean, metrics, seen)
