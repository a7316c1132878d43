"""The policy loss against exact expectations, finite differences, hand-worked numbers and a loop over sequences; TRL's
numbers are in test_trl.py."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rl.loss import LossSettings, PolicyTokens, Totals, grpo_loss, k3, off_policy_kl, sequence_means

OPEN = LossSettings(clip_low=0.2, clip_high=0.3)


def one_token_sequences(
    logprobs: Tensor, behaviour: Tensor, advantages: Tensor, reference: Tensor | None = None, beta: float = 0.0
) -> PolicyTokens:
    count = logprobs.shape[0]
    strength = None if reference is None else torch.full((count,), beta, dtype=torch.float64)
    return PolicyTokens(logprobs, behaviour, advantages, torch.arange(count), count, reference, strength)


def totals(tokens: PolicyTokens) -> Totals:
    return Totals(tokens.num_sequences, int((tokens.sequence >= 0).sum()))


def categorical(seed: int, outcomes: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outcomes, generator=generator, dtype=torch.float64)


def expected_kl_term(theta: Tensor, old: Tensor, reference: Tensor, trainer: Tensor | None = None) -> Tensor:
    """E_{x ~ old} of the loss's KL term by summing over every outcome: each outcome is a sequence, weighted by its
    probability. `trainer`: logits of a pi_old that is not the sampler's."""
    logp, logq, logr = theta.log_softmax(0), old.log_softmax(0), reference.log_softmax(0)
    total = torch.zeros((), dtype=torch.float64)
    for outcome in range(theta.shape[0]):
        pick = slice(outcome, outcome + 1)
        tokens = one_token_sequences(logp[pick], logq[pick], torch.zeros(1, dtype=torch.float64), logr[pick], beta=1.0)
        if trainer is not None:
            tokens = replace(tokens, old=trainer.log_softmax(0)[pick])
        cap = None if trainer is None else 1.1
        settings = LossSettings(0.2, 0.2, importance_cap=cap)
        total = total + logq[outcome].exp() * grpo_loss(tokens, settings, Totals(1, 1))[0]
    return total


def true_kl(theta: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """KL(pi_theta || pi_ref) and its gradient."""
    value = (theta.softmax(0) * (theta.log_softmax(0) - reference.log_softmax(0))).sum()
    return value, torch.autograd.grad(value, theta)[0]


@pytest.mark.parametrize("trainer", [None, categorical(4)])
def test_unbiased_kl_has_the_true_value_and_gradient(trainer: Tensor | None):
    """Whosever pi_old is: k is weighted by the sampler's probability, for the sampler drew the token."""
    theta, old, reference = categorical(1).requires_grad_(), categorical(2), categorical(3)
    value, wanted = true_kl(theta, reference)
    estimate = expected_kl_term(theta, old, reference, trainer)
    (gradient,) = torch.autograd.grad(estimate, theta)
    assert estimate.item() == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)


ESTIMATORS = {  # x = log(pi_ref / pi_theta), r = pi_theta / pi_old; -> (is the value right, cosine of the gradient)
    "plain K3": (lambda r, x: k3(x), False, 0.457),
    "K3, r differentiable": (lambda r, x: r * k3(x), True, 1.0),
    "K3, r detached": (lambda r, x: r.detach() * k3(x), True, 0.89),
    "K2, r detached": (lambda r, x: r.detach() * x.square() / 2, False, 1.0),
    "K1, r differentiable": (lambda r, x: r * -x, True, 1.0),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_what_each_estimator_of_the_kl_expects(name: str):
    """Why eq. 7 and why its ratio is not detached: exact expectations over the categorical's outcomes."""
    estimator, right_value, cosine = ESTIMATORS[name]
    theta, old, reference = categorical(1).requires_grad_(), categorical(2), categorical(3)
    logp, logq, logr = theta.log_softmax(0), old.log_softmax(0), reference.log_softmax(0)
    value, wanted = true_kl(theta, reference)
    estimate = (logq.exp() * estimator((logp - logq).exp(), logr - logp)).sum()
    (gradient,) = torch.autograd.grad(estimate, theta, retain_graph=True)
    assert (abs(estimate - value) < 1e-12).item() is right_value
    assert torch.cosine_similarity(gradient, wanted, dim=0).item() == pytest.approx(cosine, abs=0.005)
    if name == "K3, r detached":  # it is the gradient of the KL the other way round
        forward = (logr.exp() * (logr - logp)).sum()
        torch.testing.assert_close(gradient, torch.autograd.grad(forward, theta)[0], rtol=1e-10, atol=1e-12)


def test_truncated_weights_expect_the_policy_gradient_while_the_cap_does_not_bind():
    """E_{x ~ sampler} of the surrogate's gradient at pi_theta = pi_old of the trainer is sum_x grad pi_theta(x) A(x);
    without the weight it is another."""
    theta, sampler, advantages = categorical(1).requires_grad_(), categorical(2), categorical(5)
    logp, logq = theta.log_softmax(0), sampler.log_softmax(0)
    (wanted,) = torch.autograd.grad((logp.exp() * advantages).sum(), theta, retain_graph=True)
    gradients = {}
    for cap in (None, 2.0, 1e6):
        total = torch.zeros((), dtype=torch.float64)
        for x in range(12):
            pick = slice(x, x + 1)
            tokens = one_token_sequences(logp[pick], logq[pick], advantages[pick])
            tokens = replace(tokens, old=logp[pick].detach())
            settings = LossSettings(0.2, 0.2, importance_cap=cap)
            total = total - logq[x].exp() * grpo_loss(tokens, settings, Totals(1, 1))[0]
        gradients[cap] = torch.autograd.grad(total, theta, retain_graph=True)[0]
    torch.testing.assert_close(gradients[1e6], wanted, rtol=1e-10, atol=1e-12)
    error = {cap: ((gradient - wanted).norm() / wanted.norm()).item() for cap, gradient in gradients.items()}
    assert 0.01 < error[2.0] < error[None]


def random_tokens(seed: int = 0, rows: int = 40, sequences: int = 4) -> PolicyTokens:
    """Interleaved sequences of unequal lengths with untrained tokens between them, and a missing log-prob."""
    generator = torch.Generator().manual_seed(seed)

    def noise(size: int = rows) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    sequence = torch.randint(-1, sequences, (rows,), generator=generator)
    behaviour = -torch.rand(rows, generator=generator, dtype=torch.float64) * 3
    logprobs, reference, old = (behaviour + 0.4 * noise() for _ in range(3))
    advantages, beta = noise(sequences + 1)[sequence], noise(sequences).abs()
    behaviour[(sequence == 0).nonzero()[1]] = math.nan
    return PolicyTokens(logprobs.requires_grad_(), behaviour, advantages, sequence, sequences, reference, beta, old)


def loss_by_loop(t: PolicyTokens, s: LossSettings, total: Totals) -> float:
    """The formulas of rl/loss.py's head, one token at a time in plain Python."""
    loss = 0.0
    for number in range(t.num_sequences):
        rows = (t.sequence == number).nonzero().squeeze(1).tolist()
        gaps = [(t.behaviour[i] - t.logprobs[i]).item() for i in rows]
        drift = sum(gap for gap in gaps if not math.isnan(gap)) / len(rows)
        for i in rows:
            theta, advantage = t.logprobs[i].item(), t.advantages[i].item()
            missing = math.isnan(t.behaviour[i].item())
            sampler = t.behaviour[i].item() if not missing else theta if t.old is None else t.old[i].item()
            old = sampler if t.old is None else t.old[i].item()
            ratio = math.exp(theta - old)
            surrogate = min(ratio * advantage, min(max(ratio, 1 - s.clip_low), 1 + s.clip_high) * advantage)
            if s.importance_cap is not None:
                surrogate *= min(math.exp(old - sampler), s.importance_cap)
            if s.off_policy_delta is not None and advantage < 0 and drift > s.off_policy_delta:
                surrogate = 0.0
            if t.beta is not None and t.reference is not None:
                x = t.reference[i].item() - theta
                surrogate -= t.beta[number].item() * math.exp(theta - sampler) * (math.exp(x) - x - 1)
            share = total.tokens if s.loss_mean == "token" else len(rows) * total.sequences
            loss -= surrogate / share
    return loss


@pytest.mark.parametrize("mean", ["sequence", "token"])
@pytest.mark.parametrize("cap", [None, 1.2])
@pytest.mark.parametrize("delta", [None, 0.0, 0.1])
@pytest.mark.parametrize("without", [(), ("beta",), ("old",), ("beta", "reference", "old")])
def test_segment_sums_equal_a_loop_over_sequences(
    without: tuple[str, ...], delta: float | None, cap: float | None, mean: str
):
    settings = LossSettings(0.2, 0.3, delta, None if "old" in without else cap, mean)
    for seed in range(4):
        tokens = replace(random_tokens(seed), **dict.fromkeys(without))
        found = grpo_loss(tokens, settings, Totals(7, 90))[0].item()
        assert found == pytest.approx(loss_by_loop(tokens, settings, Totals(7, 90)), rel=1e-12)


@pytest.mark.parametrize("mean", ["sequence", "token"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_gradient_equals_finite_differences(decoupled: bool, mean: str):
    settings = LossSettings(0.2, 0.3, 0.05, 1.2 if decoupled else None, mean)
    tokens = random_tokens(3)
    if not decoupled:  # a missing log-prob counts as the current policy's, held fast: no difference shows that
        tokens = replace(tokens, old=None, sequence=tokens.sequence.masked_fill(tokens.behaviour.isnan(), -1))
    (gradient,) = torch.autograd.grad(grpo_loss(tokens, settings, totals(tokens))[0], tokens.logprobs)
    step = 1e-6
    for i in range(tokens.logprobs.shape[0]):
        values = []
        for sign in (1, -1):
            moved = tokens.logprobs.detach().clone()
            moved[i] += sign * step
            values.append(grpo_loss(replace(tokens, logprobs=moved), settings, totals(tokens))[0].item())
        assert gradient[i].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-9)
    assert (gradient[tokens.sequence < 0] == 0).all() and (gradient != 0).any()


def test_hand_worked_numbers():
    """Two sequences. A=+1: ratios 1.5 (clipped to 1.3) and 1; A=-1: ratio 0.5 (clipped to 0.8).

    -[ (1.3 + 1)/2 + (-0.8)/1 ] / 2 = -(1.15 - 0.8)/2 = -0.175
    """
    ratios = torch.tensor([1.5, 1.0, 0.5], dtype=torch.float64)
    behaviour = torch.tensor([-1.0, -2.0, -0.7], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    tokens = PolicyTokens(behaviour + ratios.log(), behaviour, advantages, torch.tensor([0, 0, 1]), 2)
    loss, metrics, _ = grpo_loss(tokens, OPEN, Totals(2, 3))
    assert loss.item() == pytest.approx(-0.175, rel=1e-12)
    assert metrics["policy/clip_frac"].item() == pytest.approx((0.5 + 1.0) / 2)
    assert metrics["policy/ratio_mean"].item() == pytest.approx((1.25 + 0.5) / 2)
    expected_k3 = ((1.5 - 1 - math.log(1.5)) / 2 + (0.5 - 1 - math.log(0.5))) / 2
    assert metrics["mismatch/k3"].item() == pytest.approx(expected_k3)


def test_token_mean_by_hand():
    """The same tokens, each with weight 1/3: -(1.3 + 1 - 0.8)/3 = -0.5; metrics stay means over sequences."""
    ratios = torch.tensor([1.5, 1.0, 0.5], dtype=torch.float64)
    behaviour, advantages = torch.tensor([-1.0, -2.0, -0.7]).double(), torch.tensor([1.0, 1.0, -1.0]).double()
    tokens = PolicyTokens(behaviour + ratios.log(), behaviour, advantages, torch.tensor([0, 0, 1]), 2)
    loss, metrics, _ = grpo_loss(tokens, replace(OPEN, loss_mean="token"), Totals(2, 3))
    assert loss.item() == pytest.approx(-0.5, rel=1e-12)
    assert metrics["policy/clip_frac"].item() == pytest.approx((0.5 + 1.0) / 2)


def test_truncated_weights_by_hand():
    """A=1, three sequences of a token: pi_old/pi_sampler 0.5, 1.5 and 4 with C = 2, pi_theta/pi_old 1, 1.1 and 1.

    -(0.5 x 1 + 1.5 x 1.1 + 2 x 1)/3; the gradient in log pi_theta is the same: w is no part of it.
    """
    sampler, weights = torch.tensor([-2.0, -3.0, -4.0]).double(), torch.tensor([0.5, 1.5, 4.0]).double()
    old = sampler + weights.log()
    logprobs = (old + torch.tensor([1.0, 1.1, 1.0], dtype=torch.float64).log()).requires_grad_()
    tokens = replace(one_token_sequences(logprobs, sampler, torch.ones(3).double()), old=old)
    loss, metrics, _ = grpo_loss(tokens, replace(OPEN, importance_cap=2.0), Totals(3, 3))
    wanted = [0.5, 1.65, 2.0]
    assert loss.item() == pytest.approx(-sum(wanted) / 3, rel=1e-12)
    assert (-3 * torch.autograd.grad(loss, logprobs)[0]).tolist() == pytest.approx(wanted, rel=1e-12)
    assert metrics["policy/importance_mean"].item() == pytest.approx((0.5 + 1.5 + 2) / 3)
    assert metrics["policy/importance_capped_frac"].item() == pytest.approx(1 / 3)
    without = grpo_loss(tokens, OPEN, Totals(3, 3)).loss
    assert without.item() == pytest.approx(-(1 + 1.1 + 1) / 3, rel=1e-12)


def test_each_domain_has_its_own_strength():
    """Two tokens with the same drift from the reference; the first's beta is 0."""
    logprobs = torch.full((2,), -1.0, dtype=torch.float64, requires_grad=True)
    tokens = one_token_sequences(logprobs, logprobs.detach(), torch.zeros(2).double(), torch.full((2,), -2.0).double())
    tokens = replace(tokens, beta=torch.tensor([0.0, 0.5]).double())
    loss, metrics, _ = grpo_loss(tokens, OPEN, Totals(2, 2))
    kl = math.exp(-1)  # exp(x) - x - 1 at x = -1
    assert loss.item() == pytest.approx(0.5 * kl / 2, rel=1e-12)
    assert metrics["policy/kl_ref"].item() == pytest.approx(kl, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient[0] == 0 and gradient[1].item() == pytest.approx(0.5 * (kl - (math.exp(-1) - 1)) / 2, rel=1e-12)


def test_a_kl_without_strength_cannot_spoil_the_loss():
    """exp(119) is infinite in fp32: the first sequence's beta is 0, so it has no part."""
    logprobs = torch.tensor([-120.0, -1.0], requires_grad=True)
    tokens = one_token_sequences(logprobs, logprobs.detach(), torch.zeros(2), torch.tensor([-1.0, -2.0]))
    tokens = replace(tokens, beta=torch.tensor([0.0, 0.5]))
    for estimator in ("unbiased", "k3"):
        loss, metrics, seen = grpo_loss(tokens, replace(OPEN, kl_estimator=estimator), Totals(2, 2))
        assert loss.item() == pytest.approx(0.5 * math.exp(-1) / 2) and metrics["policy/kl_ref"].isinf()
        assert torch.autograd.grad(loss, logprobs)[0].isfinite().all()


def test_plain_k3_has_no_ratio_in_value_or_gradient():
    """pi_theta = e^-1 drawn with e^-0.5, pi_ref = e^-2: k = exp(x) - x - 1 at x = -1 and dk/dlogpi = 1 - exp(x)."""
    logprobs = torch.full((1,), -1.0, dtype=torch.float64, requires_grad=True)
    sampler, reference = torch.full((1,), -0.5).double(), torch.full((1,), -2.0).double()
    tokens = replace(one_token_sequences(logprobs, sampler, torch.zeros(1).double(), reference), beta=torch.ones(1))
    for estimator, weight in (("k3", 1.0), ("unbiased", math.exp(-0.5))):
        loss, *_ = grpo_loss(tokens, replace(OPEN, kl_estimator=estimator), Totals(1, 1))
        assert loss.item() == pytest.approx(weight * math.exp(-1), rel=1e-12)
        slope = 1 - math.exp(-1) if estimator == "k3" else weight * (math.exp(-1) + 1 - math.exp(-1))
        assert torch.autograd.grad(loss, logprobs)[0].item() == pytest.approx(slope, rel=1e-12)


def test_a_missing_log_prob_is_no_evidence_and_no_weight():
    """Sequence 0: the one token that is known drifted by 0.4 = 0.2 a token of two; on its own it would be 0.4."""
    behaviour = torch.tensor([-1.0, math.nan, -1.0], dtype=torch.float64)
    logprobs = torch.tensor([-1.4, -3.0, -1.4], dtype=torch.float64, requires_grad=True)
    tokens = PolicyTokens(logprobs, behaviour, -torch.ones(3).double(), torch.tensor([0, 0, 1]), 2)
    assert off_policy_kl(tokens).tolist() == pytest.approx([0.2, 0.4])
    settings = LossSettings(0.9, 0.2, off_policy_delta=0.3)
    loss, metrics, _ = grpo_loss(tokens, settings, Totals(2, 3))
    assert metrics["policy/off_policy_masked_frac"].item() == 0.5  # sequence 1 alone
    assert loss.item() == pytest.approx((math.exp(-0.4) + 1) / 2 / 2)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient.tolist() == pytest.approx([math.exp(-0.4) / 4, 1 / 4, 0.0])
    old = torch.tensor([-1.0, -3.5, -1.0], dtype=torch.float64)
    loss, metrics, _ = grpo_loss(replace(tokens, old=old), replace(settings, importance_cap=9.0), Totals(2, 3))
    assert metrics["policy/importance_mean"].item() == pytest.approx(1.0)
    assert loss.item() == pytest.approx((math.exp(-0.4) + math.exp(0.5)) / 2 / 2)


def test_off_policy_mask_drops_stale_negative_sequences_from_the_surrogate_alone():
    """Sequence 0: A<0 and drifted by 1; 1: A>0 and drifted by 1; 2: A<0 and on policy. Only 0 is masked; its KL
    stays."""
    behaviour = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
    logprobs = torch.tensor([-2.0, -2.0, -1.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64)
    reference = behaviour.clone()
    tokens = one_token_sequences(logprobs, behaviour, advantages, reference)
    settings = LossSettings(0.9, 0.2, off_policy_delta=0.5)
    assert off_policy_kl(tokens).tolist() == [1.0, 1.0, 0.0]
    loss, metrics, _ = grpo_loss(tokens, settings, Totals(3, 3))
    assert metrics["policy/off_policy_masked_frac"].item() == pytest.approx(1 / 3)
    assert loss.item() == pytest.approx(-(0.0 + math.exp(-1) - 1.0) / 3)
    with_kl = grpo_loss(replace(tokens, beta=torch.ones(3).double()), settings, Totals(3, 3)).loss
    (gradient,) = torch.autograd.grad(with_kl, logprobs)
    assert gradient[0].item() != 0
    on_trainer = replace(tokens, old=logprobs.detach())  # the measure stays the sampler's, whosever pi_old is
    assert grpo_loss(on_trainer, settings, Totals(3, 3))[1]["policy/off_policy_masked_frac"].item() > 0.3


def cut(tokens: PolicyTokens, keep: Tensor) -> PolicyTokens:
    """The row with some of its tokens; the numbers of the sequences stay."""
    per_token = ("logprobs", "behaviour", "advantages", "sequence", "reference", "old")
    held = {name: getattr(tokens, name)[keep].detach() for name in per_token}
    return replace(tokens, **held)


@pytest.mark.parametrize("mean", ["sequence", "token"])
def test_shares_of_two_rows_add_up_to_one_row(mean: str):
    tokens, settings = random_tokens(5), LossSettings(0.2, 0.3, 0.1, 1.2, mean)
    whole, metrics, _ = grpo_loss(tokens, settings, totals(tokens))
    first, second = cut(tokens, tokens.sequence <= 1), cut(tokens, tokens.sequence > 1)
    assert tokens.beta is not None
    first = replace(first, num_sequences=2, beta=tokens.beta[:2])
    second = replace(second, num_sequences=2, beta=tokens.beta[2:], sequence=second.sequence - 2)
    parts = [grpo_loss(part, settings, totals(tokens)) for part in (first, second)]
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.item(), rel=1e-12)
    for name, value in metrics.items():
        assert sum(found[name].item() for _, found, _ in parts) == pytest.approx(value.item(), rel=1e-12), name


@pytest.mark.parametrize("mean", ["sequence", "token"])
def test_a_sample_of_two_rows_weighs_what_it_weighs_in_one(mean: str):
    """Sequence 1 goes on as sequence 4, as where a context began anew: the same loss, gradient and metrics."""
    whole = replace(random_tokens(), beta=torch.tensor([0.1, 0.3, 0.0, 0.2]))
    settings, total = replace(OPEN, loss_mean=mean), totals(whole)
    places = (whole.sequence == 1).nonzero().squeeze(1)
    numbers = whole.sequence.clone()
    numbers[places[len(places) // 3 :]] = 4
    lengths = torch.bincount(whole.sequence[whole.sequence >= 0], minlength=4)
    assert whole.beta is not None
    parted = replace(
        whole,
        sequence=numbers,
        num_sequences=5,
        beta=torch.cat([whole.beta, whole.beta[1:2]]),
        lengths=torch.cat([lengths, lengths[1:2]]),
    )
    results = [grpo_loss(tokens, settings, total) for tokens in (whole, parted)]
    gradients = [torch.autograd.grad(result.loss, whole.logprobs)[0] for result in results]
    torch.testing.assert_close(results[1].loss, results[0].loss)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert {n: float(v) for n, v in results[1].metrics.items()} == pytest.approx(
        {n: float(v) for n, v in results[0].metrics.items()}
    )


def test_a_row_without_sequences_has_zero_loss_and_zero_gradient():
    logprobs = torch.zeros(8, requires_grad=True)
    tokens = PolicyTokens(logprobs, torch.zeros(8), torch.zeros(8), torch.full((8,), -1), 0)
    loss, metrics, _ = grpo_loss(tokens, OPEN, Totals(5, 9))
    loss.backward()
    assert loss.item() == 0.0 and logprobs.grad is not None and (logprobs.grad == 0).all()
    assert all(value.item() == 0 for value in metrics.values())


def test_what_a_formula_needs_and_has_not_is_refused():
    tokens = one_token_sequences(torch.zeros(2), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="a KL to the reference needs its log-probs"):
        grpo_loss(replace(tokens, beta=torch.ones(2)), OPEN, Totals(2, 2))
    with pytest.raises(ValueError, match="importance_cap=2.0 needs pi_old of the trainer"):
        grpo_loss(tokens, replace(OPEN, importance_cap=2.0), Totals(2, 2))


def test_a_mean_over_no_token_is_zero():
    found = sequence_means(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, -1, 2]), 3)
    assert found.tolist() == [0.0, 0.0, 2.5]
