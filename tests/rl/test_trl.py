"""The policy loss against TRL's: value and gradient wherever the two mean the same thing.

trl_1_16_0.json was made by trl 1.16.0 itself, on random numbers rounded to two digits (float64): each case is
`GRPOTrainer._compute_loss` on a stand-in trainer whose `_get_per_token_logps_and_entropies` returns `logprobs`, with
epsilon_low 0.2, epsilon_high 0.28, use_bias_correction_kl (eq. 7), and its autograd gradient; loss_type "grpo" is our
`sequence`, "dapo" our `token`. `importance_sampling_ratio` is the clamp of `_generate_and_score_completions` in mode
token_truncate. `dropped` is the complement of `GRPOTrainer.get_off_policy_mask`. A KL beside a pi_old of the trainer is
not compared: TRL weighs it by pi_theta / pi_old, we by pi_theta / pi_sampler, which drew the token.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rl.loss import LossSettings, PolicyTokens, Totals, grpo_loss, off_policy_kl

GOLDEN = json.loads((Path(__file__).parent / "trl_1_16_0.json").read_text())
CASES = {  # case -> (loss_mean, beta, delta, cap, whether pi_old is the trainer's, whose log-probs the sampler's are)
    "sequence": ("sequence", 0.0, None, None, False, "sampler"),
    "token": ("token", 0.0, None, None, False, "sampler"),
    "sequence_kl": ("sequence", 0.3, None, None, False, "sampler"),
    "token_kl": ("token", 0.3, None, None, False, "sampler"),
    "mask": ("sequence", 0.3, 0.1, None, False, "sampler"),
    "token_mask": ("token", 0.3, 0.1, None, False, "sampler"),
    "decoupled": ("sequence", 0.0, None, None, True, "sampler"),
    "truncated": ("sequence", 0.0, None, 1.3, True, "sampler"),
    "truncated_mask_missing": ("sequence", 0.0, 0.1, 1.3, True, "sampler_missing"),
}


def flat(name: str) -> Tensor:
    """A column of the file without the padding: sequence after sequence."""
    rows = zip(GOLDEN[name], GOLDEN["lengths"], strict=True)
    values = [math.nan if value is None else value for row, length in rows for value in row[:length]]
    return torch.tensor(values, dtype=torch.float64)


def tokens_of(sampler: str, decoupled: bool, beta: float) -> PolicyTokens:
    lengths = torch.tensor(GOLDEN["lengths"])
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
    return PolicyTokens(
        logprobs=flat("logprobs").requires_grad_(),
        behaviour=flat(sampler),
        advantages=torch.tensor(GOLDEN["advantages"], dtype=torch.float64)[sequence],
        sequence=sequence,
        num_sequences=len(lengths),
        reference=flat("reference") if beta else None,
        beta=torch.full((len(lengths),), beta, dtype=torch.float64) if beta else None,
        old=flat("old") if decoupled else None,
    )


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_trls(case: str):
    mean, beta, delta, cap, decoupled, sampler = CASES[case]
    tokens = tokens_of(sampler, decoupled, beta)
    totals = Totals(len(GOLDEN["lengths"]), sum(GOLDEN["lengths"]))
    loss, *_ = grpo_loss(tokens, LossSettings(0.2, 0.28, delta, cap, mean), totals)
    (gradient,) = torch.autograd.grad(loss, tokens.logprobs)
    theirs = GOLDEN["cases"][case]
    assert loss.item() == pytest.approx(theirs["loss"], rel=1e-11)
    rows = zip(theirs["gradient"], GOLDEN["lengths"], strict=True)
    assert gradient.tolist() == pytest.approx([g for row, length in rows for g in row[:length]], rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("case", GOLDEN["dropped"])
def test_the_same_sequences_are_dropped(case: str):
    sampler, _, delta = case.rpartition("_")
    tokens = tokens_of(sampler, False, 0.0)
    negative = torch.tensor(GOLDEN["advantages"]) < 0
    assert ((off_policy_kl(tokens) > float(delta)) & negative).tolist() == GOLDEN["dropped"][case]


def test_the_file_tells_the_cases_apart():
    assert len({case["loss"] for case in GOLDEN["cases"].values()}) == len(GOLDEN["cases"]) == len(CASES)
    assert GOLDEN["dropped"]["sampler_0.0"] != GOLDEN["dropped"]["sampler_missing_0.0"]
    assert len({tuple(GOLDEN["dropped"][f"sampler_{delta}"]) for delta in ("0.0", "0.4", "0.6")}) == 3
