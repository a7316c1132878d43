"""Any layout of ranks, ZeRO stages, experts, slices and micro-batches takes the same steps as one plain process.

AdamW and clipping alone would hide a wrong scale of the gradient, so plain SGD without clipping runs as well. What the
indexer selects is compared row by row: only a row whose scores at the k border are closer than rounding may differ.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import model.mla
from conf.schema import OptimConfig, ParallelConfig, TrainConfig
from model.ops.index_topk.reference import index_scores, visible
from model.ops.settings import OpSettings
from tests.distributed.helper import run_ranks
from tests.train import tiny
from train.engine import Engine
from train.losses import Counts, global_counts, micro_batch_loss
from train.optim import build_optimizer, parameter_groups, select_trainable
from train.parallel.cp import ContextParallel, zigzag
from train.parallel.ep import ExpertParallel
from train.precision import fp8_backend
from train.stages import STAGES

STEPS, SEQUENCES, LENGTH = 5, 4, 16
FIRST, LATER = 1e-5, 2e-5  # relative: step 1 (loss and gradients), steps 2-5 (losses)
BORDER = 1e-6  # relative gap of the k-th to the next score above which a selection must be the same
MOST_EXCUSED = 0.05  # of the rows compared; relu of four index heads makes exact ties at zero
RATES = {"trunk": 3e-2, "indexer": 5e-2}
STAGE_NAMES = ("pretrain", "dense_warmup", "sparse_adapt")


@dataclass
class Found:
    """What one process saw: the loss of each step, and of step 1 the gradients and the selections by sequence."""

    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    selected: dict[int, list[Tensor]] = field(default_factory=dict)  # sequence -> [rows, k] of each layer
    gaps: dict[int, list[Tensor]] = field(default_factory=dict)  # likewise [rows]; of the reference


class Watch:
    """Records every selection of the indexer under the number of the sequence that runs."""

    def __init__(self, found: Found) -> None:
        self.found, self.sequence, self.real = found, 0, model.mla.index_topk
        self.on = True

    def __enter__(self) -> Watch:
        model.mla.index_topk = self
        return self

    def __exit__(self, *_: object) -> None:
        model.mla.index_topk = self.real

    def __call__(self, q: Tensor, k: Tensor, w: Tensor, doc_start: Tensor, topk: int, **rest: object) -> Tensor:
        idx = self.real(q, k, w, doc_start, topk, **rest)
        if self.on:
            self.found.selected.setdefault(self.sequence, []).append(idx)
            if rest.get("q_pos") is None:
                scores = index_scores(q.double(), k.double(), w.double()).masked_fill(~visible(doc_start), -torch.inf)
                scores = scores.sort(-1, descending=True).values
                kth, after = scores[:, topk - 1], scores[:, topk]
                gap = torch.where(after.isinf(), torch.inf, (kth - after) / kth.abs().clamp(min=1e-30))
                self.found.gaps.setdefault(self.sequence, []).append(gap)
        return idx


def optim_config(kind: str) -> OptimConfig:
    # eps well above the rounding of tiny gradients, whose sign AdamW would otherwise blow up to a whole step
    return OptimConfig(lr=1.0, eps=1e-4, clip=0.0 if kind == "sgd" else 0.05)


def make_optimizer(net: torch.nn.Module, kind: str, fused: bool = False) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(parameter_groups(net, 0.0), lr=1.0)
    return build_optimizer(net, optim_config(kind), fused)


def reference(stage_name: str, kind: str) -> Found:
    """Plain torch: all sequences of a step in one process, one backward over the summed loss."""
    stage, net, found = STAGES[stage_name], tiny.build(), Found()
    select_trainable(net, stage)
    optimizer = make_optimizer(net, kind)
    with Watch(found) as watch:
        for step in range(STEPS):
            watch.on = step == 0
            batches = [tiny.batch(step * SEQUENCES + i, LENGTH) for i in range(SEQUENCES)]
            counts = Counts(
                sum(int((b["labels"] >= 0).sum()) for b in batches),
                sum(int((b["mtp_labels"] >= 0).sum()) for b in batches),
                sum(int((b["doc_start"] <= torch.arange(LENGTH)).sum()) for b in batches),
                SEQUENCES,
            )
            kwargs = {"attention": stage.attention, "indexer_loss": stage.indexer_loss}
            outs = []
            for i, batch in enumerate(batches):
                watch.sequence = i
                outs.append(net(**batch, **kwargs, lm_loss=stage.lm_loss, trunk_grad=stage.trunk_grad))
            loss = torch.stack([micro_batch_loss(out, counts, stage, TrainConfig())[0] for out in outs]).sum()
            optimizer.zero_grad()
            loss.backward()
            found.losses.append(float(loss.detach()))
            if step == 0:
                found.gradients = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
            if kind != "sgd":
                torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05)
            for group in optimizer.param_groups:
                group["lr"] = RATES[group["role"]]
            optimizer.step()
    return found


def offloads(engine: Engine) -> tuple[bool, bool]:
    """Whether DeepSpeed moves the optimiser and the parameters: on a CPU nothing else would show it."""
    inner = engine._engine.optimizer
    if engine.zero == 0:
        return False, False
    return (inner.offload_optimizer, inner.offload_param) if engine.zero == 3 else (inner.cpu_offload, False)


def train(stage_name: str, kind: str, parallel: ParallelConfig, precision: str = "fp32") -> Found:
    from deepspeed.utils import safe_get_full_grad

    stage, net, found = STAGES[stage_name], tiny.build(), Found()
    cp, ep = ContextParallel(parallel.cp), ExpertParallel(parallel.ep)
    ep.cut(net)
    select_trainable(net, stage)
    net.use(OpSettings(fp8_linear=fp8_backend(precision, torch.device("cpu"))))
    optimizer = make_optimizer(net, kind, fused=parallel.offload != "none")
    engine = Engine(net, optimizer, optim_config(kind), parallel, precision)
    assert offloads(engine) == (parallel.offload != "none", parallel.offload_parameters)
    local = SEQUENCES // cp.replicas
    with Watch(found) as watch:
        for step in range(STEPS):
            watch.on = step == 0
            first = step * SEQUENCES + cp.replica * local
            batches = [tiny.batch(first + j, LENGTH) for j in range(local)]
            counts, total = global_counts(batches, cp.size), torch.zeros(())
            for j, fields in enumerate(batches):
                watch.sequence = cp.replica * local + j
                rows, context = cp.share(fields)
                out = engine.forward(
                    **rows,
                    context=context,
                    attention=stage.attention,
                    indexer_loss=stage.indexer_loss,
                    lm_loss=stage.lm_loss,
                    trunk_grad=stage.trunk_grad,
                )
                loss, _ = micro_batch_loss(out, counts, stage, TrainConfig())
                total += loss.detach()
                engine.backward(loss, last=j == local - 1)
            dist.all_reduce(total)
            found.losses.append(float(total))
            if step == 0:
                for name, p in net.named_parameters():
                    if p.requires_grad:
                        found.gradients[name] = safe_get_full_grad(p).clone()
            engine.step(RATES)
    return found


def assert_equal(found: Found, wanted: Found, parallel: ParallelConfig, rank: int) -> None:
    cp, ep = parallel.cp, parallel.ep
    assert found.losses[0] == pytest.approx(wanted.losses[0], rel=FIRST)
    assert found.losses[1:] == pytest.approx(wanted.losses[1:], rel=LATER)
    for name, value in wanted.gradients.items():
        mine = found.gradients[name]
        if ".experts." in name:
            value = value.chunk(ep)[rank % ep]
        assert mine.shape == value.shape, name
        assert float((mine - value).norm()) <= FIRST * float(value.norm()), name
    assert found.gradients.keys() <= wanted.gradients.keys()
    rows = zigzag(LENGTH, cp, rank % cp) if cp > 1 else torch.arange(LENGTH)
    compared = excused = 0
    for sequence, layers in found.selected.items():
        for mine, theirs, gap in zip(layers, wanted.selected[sequence], wanted.gaps[sequence], strict=True):
            other = (mine != theirs[rows]).any(-1) & (gap[rows] > BORDER)
            assert not other.any(), (sequence, rows[other])
            compared, excused = compared + len(rows), excused + int((gap[rows] <= BORDER).sum())
    replicas = len(wanted.selected) // max(1, len(found.selected))  # of sparse stages; dense ones select nothing
    assert len(found.selected) * replicas == len(wanted.selected) and (compared > 0) == bool(wanted.selected)
    assert excused <= MOST_EXCUSED * compared, f"{excused} of {compared} rows are too close to compare"


LAYOUTS = [  # world, (zero, ep, cp)
    *((1, (zero, 1, 1)) for zero in (1, 3)),
    *((2, layout) for layout in ((1, 1, 1), (1, 2, 1), (1, 1, 2), (1, 2, 2), (3, 2, 2))),
    *((4, layout) for layout in ((1, 1, 4), (1, 4, 1), (3, 4, 4))),
    # all of zero x ep x cp; ZeRO 0 with experts shared out is refused, see conf/validate.py
    *((4, (zero, ep, cp)) for zero in (0, 1, 2, 3) for ep in (1, 2) for cp in (1, 2) if zero or ep == 1),
]
CELLS = [(world, ParallelConfig(*layout, persist_below=0)) for world, layout in LAYOUTS]
OFFLOADED = [  # world, (zero, ep, cp), parameters too
    *((2, (zero, 1, 1), False) for zero in (1, 2, 3)),
    *((2, (2, 2, 2), False), (2, (3, 1, 1), True), (4, (3, 2, 2), True)),
]
OFFLOAD_CELLS = [
    (world, ParallelConfig(*layout, persist_below=0, offload="cpu", offload_parameters=parameters))
    for world, layout, parameters in OFFLOADED
]


def label(cell: tuple[int, ParallelConfig]) -> str:
    world, parallel = cell
    offload = f"-{parallel.offload}" if parallel.offload != "none" else ""
    parameters = "-parameters" if parallel.offload_parameters else ""
    return f"{world}ranks-zero{parallel.zero}-ep{parallel.ep}-cp{parallel.cp}{offload}{parameters}"


@pytest.mark.parametrize("cell", CELLS, ids=label)
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_layout_takes_the_steps_of_one_plain_process(
    stage: str, kind: str, cell: tuple[int, ParallelConfig], wanted: dict[tuple[str, str], Found]
) -> None:
    world, parallel = cell
    for rank, found in enumerate(run_ranks(train, world, stage, kind, parallel)):
        assert_equal(found, wanted[stage, kind], parallel, rank)


@pytest.mark.parametrize("cell", OFFLOAD_CELLS, ids=label)
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("stage", ["dense_warmup", "sparse_adapt"])
def test_offload_takes_the_steps_of_one_plain_process(
    stage: str, kind: str, cell: tuple[int, ParallelConfig], wanted: dict[tuple[str, str], Found]
) -> None:
    test_layout_takes_the_steps_of_one_plain_process(stage, kind, cell, wanted)


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_fp8_takes_the_same_steps_on_two_ranks(stage: str, zero: int) -> None:
    """Sequence by sequence, as one process accumulates them: tiles of 128 tokens lie alike then. Another cut of a
    sequence or another order of an expert's tokens rounds its gradients otherwise."""
    (alone,) = run_ranks(train, 1, stage, "sgd", ParallelConfig(0), "fp8")
    (plain,) = run_ranks(train, 1, stage, "sgd", ParallelConfig(0), "bf16")
    assert alone.losses[0] != plain.losses[0]
    for found in run_ranks(train, 2, stage, "sgd", ParallelConfig(zero, persist_below=0), "fp8"):
        assert found.losses == pytest.approx(alone.losses, rel=LATER)
        for name, value in alone.gradients.items():
            assert float((found.gradients[name] - value).norm()) <= FIRST * float(value.norm()), name


@pytest.mark.parametrize(("name", "bound"), [("ep", 1e-5), ("cp", 0.05)])
def test_fp8_under_ep_and_cp(name: str, bound: float) -> None:
    """Experts get the tokens of both ranks in another order, within one tile of 128: nothing changes. Under cp each
    rank rounds the gradient's tiles of its own rows alone: other roundings of the same sums, a few per cent of them."""
    (alone,) = run_ranks(train, 1, "sparse_adapt", "sgd", ParallelConfig(0), "fp8")
    parallel = ParallelConfig(1, **{name: 2}, persist_below=0)
    for rank, found in enumerate(run_ranks(train, 2, "sparse_adapt", "sgd", parallel, "fp8")):
        assert found.losses[0] == pytest.approx(alone.losses[0], rel=1e-5)
        for key, value in alone.gradients.items():
            value = value.chunk(parallel.ep)[rank % parallel.ep] if ".experts." in key else value
            assert float((found.gradients[key] - value).norm()) <= bound * float(value.norm()), key


@pytest.fixture(scope="module")
def wanted() -> dict[tuple[str, str], Found]:
    return {(stage, kind): reference(stage, kind) for stage in STAGE_NAMES for kind in ("sgd", "adamw")}
