"""The policy loss against exact expectations, finite differences, hand-worked numbers and a loop over sequences."""

import math

import pytest
import torch
from torch import Tensor

from rl.loss import LossSettings, PolicyTokens, grpo_loss, k3

OPEN = LossSettings(clip_low=0.2, clip_high=0.3)


def one_token_sequences(
    logprobs: Tensor, behaviour: Tensor, advantages: Tensor, reference: Tensor | None = None
) -> PolicyTokens:
    count = logprobs.shape[0]
    return PolicyTokens(logprobs, behaviour, advantages, torch.arange(count), count, reference)


def categorical(seed: int, outcomes: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outcomes, generator=generator, dtype=torch.float64)


def expected_kl_term(theta: Tensor, old: Tensor, reference: Tensor, detach: bool = False) -> Tensor:
    """E_{x ~ old} of the loss's KL term by summing over every outcome: each outcome is a sequence, weighted by its
    probability."""
    logp, logq, logr = theta.log_softmax(0), old.log_softmax(0), reference.log_softmax(0)
    settings = LossSettings(0.2, 0.2, beta=1.0)
    total = torch.zeros((), dtype=torch.float64)
    for outcome in range(theta.shape[0]):
        pick = slice(outcome, outcome + 1)
        tokens = one_token_sequences(logp[pick], logq[pick], torch.zeros(1, dtype=torch.float64), logr[pick])
        if detach:  # what the loss must not do
            term = (logp[pick] - logq[pick]).exp().detach() * k3(logr[pick] - logp[pick])
            total = total + logq[outcome].exp() * term.sum()
        else:
            total = total + logq[outcome].exp() * grpo_loss(tokens, settings, 1)[0]
    return total


def test_unbiased_kl_has_the_true_value_and_gradient():
    theta, old, reference = categorical(1).requires_grad_(), categorical(2), categorical(3)
    true = (theta.softmax(0) * (theta.log_softmax(0) - reference.log_softmax(0))).sum()
    (true_gradient,) = torch.autograd.grad(true, theta)
    estimate = expected_kl_term(theta, old, reference)
    (gradient,) = torch.autograd.grad(estimate, theta)
    assert estimate.item() == pytest.approx(true.item(), rel=1e-12)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-10, atol=1e-12)


def test_a_detached_ratio_gives_another_gradient():
    theta, old, reference = categorical(1).requires_grad_(), categorical(2), categorical(3)
    true = (theta.softmax(0) * (theta.log_softmax(0) - reference.log_softmax(0))).sum()
    (true_gradient,) = torch.autograd.grad(true, theta)
    detached = expected_kl_term(theta, old, reference, detach=True)
    (gradient,) = torch.autograd.grad(detached, theta)
    assert detached.item() == pytest.approx(true.item(), rel=1e-12)
    assert (gradient - true_gradient).norm() / true_gradient.norm() > 0.1


def random_tokens(seed: int = 0, rows: int = 40, sequences: int = 4) -> PolicyTokens:
    """Interleaved sequences of unequal lengths with untrained tokens between them."""
    generator = torch.Generator().manual_seed(seed)
    sequence = torch.randint(-1, sequences, (rows,), generator=generator)
    behaviour = -torch.rand(rows, generator=generator, dtype=torch.float64) * 3
    logprobs = behaviour + 0.4 * torch.randn(rows, generator=generator, dtype=torch.float64)
    reference = behaviour + 0.4 * torch.randn(rows, generator=generator, dtype=torch.float64)
    advantage = torch.randn(sequences + 1, generator=generator, dtype=torch.float64)
    return PolicyTokens(logprobs.requires_grad_(), behaviour, advantage[sequence], sequence, sequences, reference)


def loss_by_loop(t: PolicyTokens, s: LossSettings, total: int) -> float:
    """The formulas of rl/loss.py's head, one token at a time in plain Python."""
    assert t.reference is not None
    loss = 0.0
    for number in range(t.num_sequences):
        rows = (t.sequence == number).nonzero().squeeze(1).tolist()
        drift = sum((t.behaviour[i] - t.logprobs[i]).item() for i in rows) / len(rows)
        inner = 0.0
        for i in rows:
            ratio, advantage = math.exp(t.logprobs[i].item() - t.behaviour[i].item()), t.advantages[i].item()
            surrogate = min(ratio * advantage, min(max(ratio, 1 - s.clip_low), 1 + s.clip_high) * advantage)
            if s.off_policy_delta is not None and advantage < 0 and drift > s.off_policy_delta:
                surrogate = 0.0
            x = t.reference[i].item() - t.logprobs[i].item()
            inner += surrogate - s.beta * ratio * (math.exp(x) - x - 1)
        loss -= inner / len(rows) / total
    return loss


@pytest.mark.parametrize("delta", [None, 0.0, 0.1])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_segment_sums_equal_a_loop_over_sequences(beta: float, delta: float | None):
    settings = LossSettings(0.2, 0.3, beta, delta)
    for seed in range(5):
        tokens = random_tokens(seed)
        assert grpo_loss(tokens, settings, 7)[0].item() == pytest.approx(loss_by_loop(tokens, settings, 7), rel=1e-12)


def test_gradient_equals_finite_differences():
    settings = LossSettings(0.2, 0.3, beta=0.2, off_policy_delta=0.05)
    tokens = random_tokens(3)
    (gradient,) = torch.autograd.grad(grpo_loss(tokens, settings, 4)[0], tokens.logprobs)
    step = 1e-6
    for i in range(tokens.logprobs.shape[0]):
        values = []
        for sign in (1, -1):
            moved = tokens.logprobs.detach().clone()
            moved[i] += sign * step
            values.append(grpo_loss(PolicyTokens(**{**vars(tokens), "logprobs": moved}), settings, 4)[0].item())
        assert gradient[i].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-9)
    assert (gradient[tokens.sequence < 0] == 0).all()


def test_hand_worked_numbers():
    """Two sequences. A=+1: ratios 1.5 (clipped to 1.3) and 1; A=-1: ratio 0.5 (clipped to 0.8).

    -[ (1.3 + 1)/2 + (-0.8)/1 ] / 2 = -(1.15 - 0.8)/2 = -0.175
    """
    ratios = torch.tensor([1.5, 1.0, 0.5], dtype=torch.float64)
    behaviour = torch.tensor([-1.0, -2.0, -0.7], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    tokens = PolicyTokens(behaviour + ratios.log(), behaviour, advantages, torch.tensor([0, 0, 1]), 2)
    loss, metrics = grpo_loss(tokens, OPEN, 2)
    assert loss.item() == pytest.approx(-0.175, rel=1e-12)
    assert metrics["policy/clip_frac"].item() == pytest.approx((0.5 + 1.0) / 2)
    assert metrics["policy/ratio_mean"].item() == pytest.approx((1.25 + 0.5) / 2)
    expected_k3 = ((1.5 - 1 - math.log(1.5)) / 2 + (0.5 - 1 - math.log(0.5))) / 2
    assert metrics["mismatch/k3"].item() == pytest.approx(expected_k3)


def test_off_policy_mask_drops_stale_negative_sequences_from_the_surrogate_alone():
    """Sequence 0: A<0 and drifted by 1; 1: A>0 and drifted by 1; 2: A<0 and on policy. Only 0 is masked; its KL
    stays."""
    behaviour = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
    logprobs = torch.tensor([-2.0, -2.0, -1.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64)
    reference = behaviour.clone()
    tokens = one_token_sequences(logprobs, behaviour, advantages, reference)
    loss, metrics = grpo_loss(tokens, LossSettings(0.9, 0.2, beta=0.0, off_policy_delta=0.5), 3)
    assert metrics["policy/off_policy_masked_frac"].item() == pytest.approx(1 / 3)
    assert loss.item() == pytest.approx(-(0.0 + math.exp(-1) - 1.0) / 3)
    with_kl, _ = grpo_loss(tokens, LossSettings(0.9, 0.2, beta=1.0, off_policy_delta=0.5), 3)
    (gradient,) = torch.autograd.grad(with_kl, logprobs)
    assert gradient[0].item() != 0


def test_shares_of_two_rows_add_up_to_one_row():
    tokens = random_tokens(5)
    whole, metrics = grpo_loss(tokens, OPEN, tokens.num_sequences)
    first = tokens.sequence <= 1
    split = [
        PolicyTokens(*(c[first] for c in (tokens.logprobs, tokens.behaviour, tokens.advantages, tokens.sequence)), 2),
        PolicyTokens(
            *(c[~first] for c in (tokens.logprobs, tokens.behaviour, tokens.advantages, tokens.sequence - 2)), 2
        ),
    ]
    parts = [grpo_loss(part, OPEN, tokens.num_sequences) for part in split]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item(), rel=1e-12)
    assert sum(m["policy/clip_frac"].item() for _, m in parts) == pytest.approx(metrics["policy/clip_frac"].item())


def test_a_row_without_sequences_has_zero_loss_and_zero_gradient():
    logprobs = torch.zeros(8, requires_grad=True)
    tokens = PolicyTokens(logprobs, torch.zeros(8), torch.zeros(8), torch.full((8,), -1), 0)
    loss, metrics = grpo_loss(tokens, OPEN, 5)
    loss.backward()
    assert loss.item() == 0.0 and logprobs.grad is not None and (logprobs.grad == 0).all()
    assert all(value.item() == 0 for value in metrics.values())


def test_beta_without_reference_is_refused():
    tokens = one_token_sequences(torch.zeros(2), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"beta=0\.1 needs reference"):
        grpo_loss(tokens, LossSettings(0.2, 0.2, beta=0.1), 2)
