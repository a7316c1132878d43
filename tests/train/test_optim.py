"""Who is in the optimiser, the schedule, and steps that are left out under every ZeRO stage."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conf.errors import UserError
from conf.schema import OptimConfig, ParallelConfig
from tests.distributed.helper import run_ranks
from tests.train import tiny
from train.engine import Engine
from train.optim import build_optimizer, parameter_groups, rates, schedule, select_trainable
from train.stages import STAGES, resolve_rates

OPTIM = OptimConfig(lr=2.0, indexer_lr=4.0, warmup_steps=4, final_lr_share=0.1)


def test_schedule_warms_up_then_falls_along_a_cosine_to_its_share() -> None:
    shares = [schedule(step, 20, OPTIM) for step in range(20)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(a > b for a, b in zip(shares[3:], shares[4:], strict=False))
    assert shares[11] == pytest.approx(0.55)  # half way between 1 and 0.1
    assert shares[19] == pytest.approx(0.1)
    assert schedule(25, 20, OPTIM) == pytest.approx(0.1)


def test_constant_schedule_stays_at_the_peak() -> None:
    assert [schedule(step, 9, replace(OPTIM, schedule="constant")) for step in (0, 3, 4, 8)] == [0.25, 1.0, 1.0, 1.0]
    assert schedule(0, 9, replace(OPTIM, warmup_steps=0, schedule="constant")) == 1.0


def test_each_role_has_its_own_rate() -> None:
    assert rates(1, 20, OPTIM) == {"trunk": 1.0, "indexer": 2.0}
    assert rates(1, 20, replace(OPTIM, indexer_lr=None)) == {"trunk": 1.0, "indexer": 1.0}


@pytest.mark.parametrize(
    ("stage", "roles"),
    [
        ("pretrain", {"trunk"}),
        ("dense_warmup", {"indexer"}),
        ("sparse_adapt", {"trunk", "indexer"}),
        ("grpo", {"trunk"}),
    ],
)
def test_the_optimizer_holds_what_the_stage_trains_and_decays_matrices_alone(stage: str, roles: set[str]) -> None:
    net = tiny.build()
    select_trainable(net, STAGES[stage])
    groups = parameter_groups(net, 0.1)
    assert {group["role"] for group in groups} == roles
    held = {id(p): group for group in groups for p in group["params"]}
    for name, p in net.named_parameters():
        role = "indexer" if ".indexer." in name else "trunk"
        assert p.requires_grad == (role in roles) == (id(p) in held), name
        if id(p) in held:
            assert held[id(p)]["role"] == role
            assert held[id(p)]["weight_decay"] == (0.1 if p.dim() > 1 else 0.0), name


def test_rates_are_the_declarations_by_width_and_the_users_word_counts() -> None:
    adapt = STAGES["sparse_adapt"]
    wide, narrow = (resolve_rates(adapt, OptimConfig(), width) for width in (7168, 128))
    assert (wide.lr, wide.indexer_lr) == (adapt.lr, adapt.indexer_lr) == (7.3e-6, 7.3e-5)
    assert (narrow.lr, narrow.indexer_lr) == (adapt.lr_narrow, adapt.indexer_lr_narrow)
    assert resolve_rates(adapt, OptimConfig(lr=0.5), 128).lr == 0.5
    assert resolve_rates(STAGES["dense_warmup"], OptimConfig(), 7168).lr == 1e-3
    with pytest.raises(UserError, match="optim.indexer_lr=0.1 is not used by stage dense_warmup"):
        resolve_rates(STAGES["dense_warmup"], OptimConfig(indexer_lr=0.1), 128)


def skipping(parallel: ParallelConfig, skipped: int | None) -> tuple[list[torch.Tensor], list[float]]:
    """Three steps of AdamW, one of them broken and left out -> (weights after each, gradient norms)."""
    net = tiny.build()
    optim = OptimConfig(lr=1.0, clip=0.5)
    engine = Engine(net, build_optimizer(net, optim), optim, parallel)
    snapshots, norms = [], []
    for step in range(3):
        out = engine.forward(**tiny.batch(0), indexer_loss="selected")
        factor = float("nan") if step == skipped else 1.0
        engine.backward(-(out.token_logprobs.sum() + out.mtp_logprobs.sum() - out.indexer_kl.sum()) * factor, last=True)
        norms.append(engine.grad_norm())
        engine.step({"trunk": 1e-2, "indexer": 1e-2}, skip=step == skipped)
        snapshots.append(torch.cat([engine.whole(name).flatten().clone() for name, _ in net.named_parameters()]))
    return snapshots, norms


LAYOUTS = {f"zero{zero}": ParallelConfig(zero) for zero in (0, 1, 2, 3)}
LAYOUTS |= {f"{name}-cpu": replace(layout, offload="cpu") for name, layout in LAYOUTS.items() if layout.zero >= 2}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("skipped", [0, 1])
def test_a_skipped_step_leaves_weights_moments_and_count_alone(layout: str, skipped: int) -> None:
    parallel = LAYOUTS[layout]
    (plain, _), (broken, norms) = (run_ranks(skipping, 1, parallel, which)[0] for which in (None, skipped))
    assert norms[skipped] == float("inf")
    before = broken[skipped - 1] if skipped else torch.cat([p.detach().flatten() for p in tiny.build().parameters()])
    assert torch.equal(broken[skipped], before)
    assert torch.equal(broken[2], plain[1])  # two real steps on the same batch, as without the broken one


def spiked(zero: int) -> list[bool]:
    """A finite step that the loop chooses to leave out."""
    net = tiny.build()
    optim = OptimConfig(lr=1.0)
    engine = Engine(net, build_optimizer(net, optim), optim, ParallelConfig(zero=zero))
    moved = []
    for skip in (True, False):
        before = net.lm_head.weight.detach().clone()
        engine.backward(-engine.forward(**tiny.batch(0)).token_logprobs.sum(), last=True)
        engine.step({"trunk": 1e-2, "indexer": 1e-2}, skip=skip)
        moved.append(not torch.equal(before, net.lm_head.weight))
    return moved


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_finite_step_can_be_left_out_too(zero: int) -> None:
    assert run_ranks(spiked, 1, zero) == [[False, True]]


def norm(zero: int) -> tuple[float, float]:
    net = tiny.build()
    optim = OptimConfig(lr=1.0)
    engine = Engine(net, build_optimizer(net, optim), optim, ParallelConfig(zero=zero))
    engine.backward(-engine.forward(**tiny.batch(torch.distributed.get_rank())).token_logprobs.sum(), last=True)
    plain = tiny.build()
    sum(-plain(**tiny.batch(rank)).token_logprobs.sum() for rank in range(2)).backward()
    grads = [p.grad.flatten() for p in plain.parameters() if p.grad is not None]
    return engine.grad_norm(), float(torch.linalg.vector_norm(torch.cat(grads)))


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_grad_norm_is_the_whole_gradients_before_clipping(zero: int) -> None:
    for found, wanted in run_ranks(norm, 2, zero):
        assert found == pytest.approx(wanted, rel=1e-5)
