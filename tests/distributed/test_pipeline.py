"""A model cut in depth takes the same steps as one plain process, under every schedule, with experts and sequences
shared out on each floor. Plain SGD runs beside AdamW with clipping: it alone shows a wrong scale of the gradient."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema import DataConfig, ModelConfig, OptimConfig, ParallelConfig, PrecisionConfig, RunConfig, TrainConfig
from model import Transformer
from model.ops.settings import OpSettings
from tests.distributed.helper import run_ranks
from tests.train import tiny
from train.losses import Counts, global_counts, micro_batch_loss, reduce_sums, step_shapes
from train.optim import build_optimizer, parameter_groups, select_trainable
from train.parallel.cp import ContextParallel
from train.parallel.ep import ExpertParallel
from train.parallel.pp import PipelineParallel
from train.pipeline_engine import PipelineEngine
from train.precision import fp8_backend
from train.stages import STAGES

STEPS, LENGTH = 3, 16
FIRST, LATER = 1e-5, 2e-5  # relative: step 1 (loss and gradients), later losses; as in test_equal_to_one_process
MOVED = 1e-4  # of how far a weight moved in all steps
RATES = {"trunk": 3e-2, "indexer": 5e-2}
CLIP = 0.05


@dataclass(frozen=True)
class Case:
    stage: str
    world: int
    parallel: ParallelConfig
    sequences: int = 4  # of a step
    layers: int = 4
    model: tuple[tuple[str, int], ...] = ()  # what differs from tiny.MODEL
    precision: str = "fp32"
    checkpointing: bool = False

    @property
    def net(self) -> ModelConfig:
        return replace(tiny.MODEL, num_hidden_layers=self.layers, **dict(self.model))  # type: ignore[arg-type]

    def __str__(self) -> str:
        p = self.parallel
        found = f"{self.stage}-{p.pp_schedule}-pp{p.pp}-ep{p.ep}-cp{p.cp}-of{self.world}-{self.sequences}x"
        found += "".join(f"-{key}{value}" for key, value in self.model)
        return found + f"-{self.precision}" * (self.precision != "fp32") + "-checkpointing" * self.checkpointing


@dataclass
class Found:
    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of step 1
    weights: dict[str, Tensor] = field(default_factory=dict)  # in the end
    counts: Tensor | None = None  # of experts and the indexer's losses by layer, in step 1
    kl: Tensor | None = None
    norm: float = 0.0  # of step 1
    bias: dict[str, Tensor] = field(default_factory=dict)  # of the routers


def optimizer_of(net: torch.nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(parameter_groups(net, 0.0), lr=1.0)
    return build_optimizer(net, optim(kind))


def optim(kind: str) -> OptimConfig:
    return OptimConfig(lr=1.0, eps=1e-4, clip=0.0 if kind == "sgd" else CLIP)


def built(case: Case) -> Transformer:
    with torch.device("meta"):
        net = Transformer(case.net)
    net.activation_checkpointing = case.checkpointing
    net.use(OpSettings(fp8_linear=fp8_backend(case.precision, torch.device("cpu"))))
    return net


def reference(case: Case, kind: str) -> Found:
    """Plain torch: all sequences of a step, one backward over the summed loss."""
    stage, net, found = STAGES[case.stage], built(case), Found()
    net.init_weights(0)
    select_trainable(net, stage)
    optimizer = optimizer_of(net, kind)
    for step in range(STEPS):
        batches = [tiny.batch(step * case.sequences + i, LENGTH) for i in range(case.sequences)]
        counts = Counts(
            sum(int((b["labels"] >= 0).sum()) for b in batches),
            sum(int((b["mtp_labels"] >= 0).sum()) for b in batches),
            sum(int((b["doc_start"] <= torch.arange(LENGTH)).sum()) for b in batches),
            case.sequences,
        )
        kwargs = {"attention": stage.attention, "indexer_loss": stage.indexer_loss, "lm_loss": stage.lm_loss}
        outs = []
        for batch in batches:  # each under its own: autocast would add up the gradients of a weight in bf16
            with torch.autocast("cpu", torch.bfloat16, enabled=case.precision != "fp32"):
                outs.append(net(**batch, **kwargs, trunk_grad=stage.trunk_grad))
        loss = torch.stack([micro_batch_loss(out, counts, stage, TrainConfig())[0] for out in outs]).sum()
        optimizer.zero_grad()
        loss.backward()
        found.losses.append(float(loss.detach()))
        experts = torch.stack([out.expert_counts for out in outs]).sum(0)
        if step == 0:
            found.gradients = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
            found.norm = float(torch.stack([g.norm() for g in found.gradients.values()]).norm())
            found.counts = experts
            if stage.indexer_loss is not None:
                found.kl = torch.stack([out.indexer_kl.detach() for out in outs]).sum(0)
        if kind != "sgd":
            torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = RATES[group["role"]]
        optimizer.step()
        net.update_router_bias(experts, 1e-2)
    found.weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    found.bias = dict(net.named_buffers())
    return found


def train(case: Case, kind: str) -> Found:
    stage, net, found, parallel = STAGES[case.stage], built(case), Found(), case.parallel
    pp = PipelineParallel(parallel.pp, parallel.pp_schedule, case.net)
    cp, ep = ContextParallel(parallel.cp, parallel.pp), ExpertParallel(parallel.ep, parallel.pp)
    pp.cut(net)
    ep.cut(net)
    net.init_weights(0)
    select_trainable(net, stage)
    local = case.sequences // cp.replicas
    config = RunConfig(
        case.stage,
        "",
        model=case.net,
        data=DataConfig(seq_len=LENGTH),
        train=TrainConfig(micro_batches=local),
        optim=optim(kind),
        parallel=parallel,
        precision=PrecisionConfig(case.precision),
    )
    engine = PipelineEngine(net, optimizer_of(net, kind), config, pp, ep)
    layers = case.net.num_hidden_layers + case.net.num_mtp_layers
    routers = layers - case.net.first_k_dense_replace
    shapes = step_shapes(stage, layers, routers, case.net.n_routed_experts, ())
    for step in range(STEPS):
        first = step * case.sequences + cp.replica * local
        batches = [tiny.batch(first + j, LENGTH) for j in range(local)]
        counts = global_counts(batches, cp.copies)
        sums = reduce_sums(engine.run([cp.share(batch) for batch in batches], counts, False), shapes)
        found.losses.append(float(sums["loss"]))
        if step == 0:
            found.gradients = whole_gradients(engine)
            found.norm, found.counts, found.kl = engine.grad_norm(), sums["expert_counts"], sums.get("kl")
        engine.step(RATES)
        engine.update_router_bias(sums["expert_counts"], 1e-2)
    found.weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    found.bias = dict(net.named_buffers())
    return found


def whole_gradients(engine: PipelineEngine) -> dict[str, Tensor]:
    """Of what this rank's floor trains, summed over the ranks that share it."""
    found, names = {}, {id(p): name for name, p in engine.net.named_parameters()}
    for group in engine.groups:
        gradients = group.gradients.clone()
        dist.all_reduce(gradients, group=group.group)
        sizes = [p.numel() for p in group.parameters]
        for p, value in zip(group.parameters, gradients[: sum(sizes)].split(sizes), strict=True):
            found[names[id(p)]] = value.view(p.shape)
    return found


def assert_equal(case: Case, found: list[Found], wanted: Found) -> None:
    ep, seen = case.parallel.ep, set()
    start = built(case)
    start.init_weights(0)
    begun = dict(start.named_parameters())
    for rank, one in enumerate(found):
        assert one.losses[0] == pytest.approx(wanted.losses[0], rel=FIRST)
        assert one.losses[1:] == pytest.approx(wanted.losses[1:], rel=LATER)
        assert one.norm == pytest.approx(wanted.norm, rel=FIRST)
        assert one.counts is not None and wanted.counts is not None
        assert torch.equal(one.counts.long(), wanted.counts)
        if wanted.kl is not None:
            torch.testing.assert_close(one.kl, wanted.kl.double(), rtol=FIRST, atol=0)

        def mine(name: str, value: Tensor, rank: int = rank) -> Tensor:
            return value.chunk(ep)[rank % ep] if ".experts." in name else value

        for name, value in one.gradients.items():
            expected = mine(name, wanted.gradients[name])
            assert float((value - expected).norm()) <= FIRST * float(expected.norm()), name
        for name, value in one.weights.items():
            expected = mine(name, wanted.weights[name])
            moved = float((expected - mine(name, begun[name].detach())).norm())
            assert float((value - expected).norm()) <= max(MOVED * moved, 1e-6 * float(expected.norm())), name
        for name, value in one.bias.items():
            assert torch.equal(value, wanted.bias[name]), name
        seen |= one.gradients.keys()
    assert seen == wanted.gradients.keys()


def layout(pp: int, schedule: str = "1f1b", ep: int = 1, cp: int = 1) -> ParallelConfig:
    return ParallelConfig(ep=ep, cp=cp, pp=pp, pp_schedule=schedule)


STAGE_NAMES = ("pretrain", "dense_warmup", "sparse_adapt")
DEEP = {"1f1b": (4, 4), "interleaved": (8, 4), "zbv": (8, 7), "dualpipev": (8, 8)}  # layers, sequences for pp=4
CASES = [
    *(Case(stage, 2, layout(2)) for stage in STAGE_NAMES),
    *(Case(stage, 2, layout(2, schedule)) for stage in STAGE_NAMES for schedule in ("interleaved", "zbv", "dualpipev")),
    *(Case(stage, 4, layout(2, ep=2)) for stage in STAGE_NAMES),
    *(Case(stage, 4, layout(2, cp=2)) for stage in STAGE_NAMES),
    *(Case(stage, 4, layout(2, ep=2, cp=2)) for stage in STAGE_NAMES),
    *(Case("sparse_adapt", 4, layout(2, schedule, ep=2, cp=2)) for schedule in ("interleaved", "zbv", "dualpipev")),
    *(
        Case(stage, 4, layout(4, schedule), layers=layers, sequences=sequences)
        for schedule, (layers, sequences) in DEEP.items()
        for stage in ("pretrain", "sparse_adapt")
    ),
]


V = ("zbv", "dualpipev")
CLIPPED = [
    *(Case(stage, 4, layout(2, ep=2, cp=2)) for stage in STAGE_NAMES),
    *(
        Case("sparse_adapt", 4, layout(2, schedule), sequences=8) for schedule in DEEP
    ),  # two replicas share AdamW's state out
]
OTHERS = [
    *(
        Case("sparse_adapt", 2, layout(2, schedule), model=(("num_nextn_predict_layers", 0),))
        for schedule in ("1f1b", *V)
    ),
    Case("pretrain", 2, layout(2), sequences=5, layers=5, model=(("first_k_dense_replace", 3),)),
    *(Case("sparse_adapt", 4, layout(2, schedule, ep=2), sequences=8, checkpointing=True) for schedule in ("1f1b", *V)),
    *(Case("sparse_adapt", 2, layout(2, schedule), precision="bf16") for schedule in ("1f1b", "zbv")),
    *(Case("sparse_adapt", 2, layout(2, schedule), precision="fp8") for schedule in ("1f1b", "zbv")),
]


@pytest.mark.parametrize("case", [*CASES, *OTHERS], ids=str)
def test_floors_take_the_steps_of_one_plain_process(case: Case) -> None:
    assert_equal(case, run_ranks(train, case.world, case, "sgd"), reference(case, "sgd"))


@pytest.mark.parametrize("case", CLIPPED, ids=str)
def test_adamw_and_clipping_too(case: Case) -> None:
    wanted = reference(case, "adamw")
    assert wanted.norm > CLIP
    assert_equal(case, run_ranks(train, case.world, case, "adamw"), wanted)
