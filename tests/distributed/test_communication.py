"""What travels between ranks in a whole step, counted on the collectives, equals the formulas of docs/parallel.md.

Counted are the bytes of the larger buffer of a call: what an all-gather gives, what a reduce-scatter takes. The
formulas see the plain model's sizes and the routers' choices alone. `small` are scalars and the step's sums, in fp64.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import train.engine
from conf.schema import OptimConfig, ParallelConfig, RunConfig
from model.context import documents
from tests.distributed.helper import run_ranks
from tests.train import tiny
from train.loop import run_step
from train.optim import build_optimizer, select_trainable
from train.parallel.cp import ContextParallel
from train.parallel.ep import ExpertParallel
from train.stages import STAGES

T, FP32, INT64, FP64 = 16, 4, 8, 8
MODEL = tiny.MODEL
LAYERS = MODEL.num_hidden_layers + MODEL.num_mtp_layers
MOE_LAYERS = LAYERS - MODEL.first_k_dense_replace
EXPERTS, CHOICES, HIDDEN = MODEL.n_routed_experts, MODEL.num_experts_per_tok, MODEL.hidden_size
WIDTH = {"fp32": 4, "bf16": 2}
LATENT, KEY = MODEL.kv_lora_rank + MODEL.qk_rope_head_dim, MODEL.index_head_dim
CALLS = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
}


@dataclass(frozen=True)
class Cell:
    """One step of a stage in one layout."""

    stage: str
    world: int
    zero: int
    ep: int = 1
    cp: int = 1
    micro_batches: int = 1
    checkpointing: bool = False
    window: bool = True  # False: ZeRO-3 keeps no parameters between two uses, as it must where layers are large
    persist_below: int = 0
    precision: str = "fp32"

    def __str__(self) -> str:
        words = [self.stage, f"{self.world}ranks", f"zero{self.zero}", f"ep{self.ep}", f"cp{self.cp}"]
        words += [f"x{self.micro_batches}", "checkpointing" if self.checkpointing else ""]
        words += ["" if self.window else "no_window", f"persist{self.persist_below}" if self.persist_below else ""]
        words += ["" if self.precision == "fp32" else self.precision]
        return "-".join(word for word in words if word)


class Bytes(TorchDispatchMode):
    """Collective -> bytes of its larger buffer, while active; any other collective is an error. Within one rank nothing
    travels: DeepSpeed calls some collectives in groups of one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = CALLS[function._schema.name.removeprefix("c10d::")]
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            tensors = [t for arg in args[:2] for t in (arg if isinstance(arg, list) else [arg])]
            largest = max((t for t in tensors if isinstance(t, torch.Tensor)), key=torch.Tensor.numel)
            small = largest.numel() == 1 or largest.dtype == torch.float64
            if group.size() > 1:
                self.found[f"small {name}" if small else name] += largest.numel() * largest.itemsize
        return function(*args, **(kwargs or {}))


def take_step(cell: Cell) -> tuple[dict[str, int], torch.Tensor]:
    """(bytes by collective of a step, experts that the router of each MoE layer chose for the rank's rows in each
    micro-batch, [MoE layers, micro-batches, R, K]). Before it ZeRO-3 learns the order of the modules in one step and
    compares it over the ranks in another."""
    stage, net, optim = STAGES[cell.stage], tiny.build(), OptimConfig(lr=1e-3)
    cp, ep = ContextParallel(cell.cp), ExpertParallel(cell.ep)
    ep.cut(net)
    net.activation_checkpointing = cell.checkpointing
    select_trainable(net, stage)
    if not cell.window:
        keep_nothing()
    parallel = ParallelConfig(cell.zero, cell.ep, cell.cp, cell.persist_below)
    engine = train.engine.Engine(net, build_optimizer(net, optim), optim, parallel, cell.precision)
    context: Any = SimpleNamespace(stage=stage, config=RunConfig(cell.stage, "", model=MODEL), cp=cp, stop_asked=False)
    first = cp.replica * cell.micro_batches
    batches = [tiny.batch(first + j, T) for j in range(cell.micro_batches)]

    def step() -> None:
        run_step(context, engine, batches, stats=True)
        engine.step({"trunk": 1e-3, "indexer": 1e-3})

    for _ in range(2 if cell.zero == 3 else 0):
        step()
    chosen: list[list[torch.Tensor]] = [[] for _ in net.routers()]
    for router, calls in zip(net.routers(), chosen, strict=True):
        router.register_forward_hook(lambda _, __, routing, calls=calls: calls.append(routing.experts))
    with Bytes() as counter:
        step()
    return dict(counter.found), torch.stack([torch.stack(calls[:: forwards(cell)]) for calls in chosen])


def keep_nothing() -> None:
    real = train.engine.ds_config

    def config(*args: Any) -> dict[str, Any]:
        found = real(*args)
        window = ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
        found["zero_optimization"] |= {f"stage3_{name}": 0 for name in window}
        return found

    train.engine.ds_config = config


# The formulas of docs/parallel.md


def forwards(cell: Cell) -> int:
    """Times that a layer's forward runs for one micro-batch; what is frozen is not checkpointed."""
    return 2 if cell.checkpointing and STAGES[cell.stage].trains_trunk else 1


@dataclass(frozen=True)
class Weight:
    """`size` values on a rank before ZeRO cuts them, the same on `ranks` ranks; `group`: of the optimiser; `uses`:
    calls of its module in a forward."""

    name: str
    size: int
    ranks: int
    group: tuple[bool, ...]
    trains: bool
    uses: int

    @property
    def padded(self) -> int:
        return -(-self.size // self.ranks) * self.ranks


def weights(cell: Cell) -> list[Weight]:
    """Those that ranks share."""
    stage, net = STAGES[cell.stage], tiny.build()
    select_trainable(net, stage)
    found = []
    for name, p in net.named_parameters():
        shared, uses = cell.ep if ".experts." in name else 1, 1
        if name.startswith("embed_tokens"):
            uses = 2  # the trunk's and MTP's
        elif name.startswith("lm_head"):
            uses = 2 if stage.lm_loss else 0
        elif "kv_b_proj" in name and stage.attention == "sparse":
            uses = 2  # keys before the attention, values behind
        elif ".indexer." in name and stage.attention == "dense" and stage.indexer_loss is None:
            uses = 0
        group = (".indexer." in name, p.dim() > 1, shared > 1)
        found.append(Weight(name, p.numel() // shared, cell.world // shared, group, p.requires_grad, uses))
    return [weight for weight in found if weight.ranks > 1]


def zero_bytes(cell: Cell) -> Counter[str]:
    """Gradients and parameters, fp32 under any precision."""
    shared, found = weights(cell), Counter[str]()
    trained = [weight for weight in shared if weight.trains]
    if cell.zero < 3:
        times = cell.micro_batches if cell.zero == 2 else 1
        found["all-reduce"] = times * FP32 * sum(weight.size for weight in trained)
    if cell.zero in (1, 2):
        for group in {weight.group for weight in trained}:
            members = [weight for weight in trained if weight.group == group]
            unit = 2 * members[0].ranks
            found["all-gather"] += FP32 * unit * -(-sum(weight.size for weight in members) // unit)
    if cell.zero == 3:
        found["reduce-scatter"] = cell.micro_batches * FP32 * sum(weight.padded for weight in trained)
        found["all-gather"] = FP32 * sum(weight.padded * gathers(weight, cell) for weight in shared)
    return found


def gathers(weight: Weight, cell: Cell) -> int:
    """How often ZeRO-3 puts a parameter together in a step."""
    if weight.size < cell.persist_below:
        return 1
    if cell.window:
        return cell.micro_batches * min(1, weight.uses)
    in_layer = weight.name.startswith(("layers.", "mtp.0.layer."))
    kept = weight.name.endswith("mlp.down_proj.weight")  # backward begins with it, and then the layer runs again
    forward = weight.uses * (forwards(cell) if in_layer and not kept else 1)
    backward = 1 if weight.name.startswith("embed_tokens") else weight.uses
    return cell.micro_batches * (forward + (backward if weight.trains else 0))


def cp_bytes(cell: Cell, sequence: int) -> Counter[str]:
    """Latents, index keys and counts of the balance loss, of one micro-batch."""
    found, stage = Counter[str](), STAGES[cell.stage]
    if cell.cp > 1:
        latents, keys = LAYERS * T * LATENT * FP32, LAYERS * T * KEY * WIDTH[cell.precision]
        keys = keys * forwards(cell) if cell.stage != "pretrain" else 0  # their gradient is made in the forward
        found["all-gather"] = forwards(cell) * latents + keys
        found["reduce-scatter"] = (latents if stage.trains_trunk else 0) + keys
        if stage.trains_trunk:
            num_documents = len(documents(tiny.batch(sequence, T)["doc_start"])[1])
            found["all-reduce"] = forwards(cell) * MOE_LAYERS * num_documents * EXPERTS * FP32
    return found


def ep_bytes(cell: Cell, choices: list[torch.Tensor], rank: int) -> Counter[str]:
    """Rows to their experts and back, and how many there are. `choices`: of each rank, as `take_step` returns them."""
    if cell.ep == 1:
        return Counter()
    first = rank - rank % cell.ep
    owners = torch.stack(choices[first : first + cell.ep]) // (EXPERTS // cell.ep)  # rank of the group, of each choice
    received = (owners == rank % cell.ep).sum((0, 3, 4))  # [MoE layers, micro-batches]
    rows = int(received.clamp(min=T // cell.cp * CHOICES).sum())
    passes = forwards(cell) + (1 if STAGES[cell.stage].trains_trunk else 0)
    there_and_back = HIDDEN * (FP32 + WIDTH[cell.precision])
    counts = cell.micro_batches * forwards(cell) * MOE_LAYERS * EXPERTS * INT64
    return Counter({"all-to-all": counts + passes * rows * there_and_back})


def small_bytes(cell: Cell) -> int:
    """Counts of targets, rows and sequences; sums of losses and metrics; gradient norms, for us and for the step."""
    stage = STAGES[cell.stage]
    sums = 2 + MOE_LAYERS * EXPERTS + (2 if stage.lm_loss else 0)
    sums += LAYERS * {"dense": 5, "selected": 3, None: 0}[stage.indexer_loss]
    norms = len({weight.group for weight in weights(replace(cell, ep=1)) if weight.trains})
    if (
        cell.ep > 1 and stage.trains_trunk
    ):  # experts have a group of their own, summed where they are the same, then over ep
        norms += 2 if cell.ep < cell.world else 1
    norm_bytes = {0: FP32, 1: 2 * FP32 * norms, 2: 2 * FP32 * norms, 3: 2 * FP64 * norms}  # ZeRO 0: clipping's alone
    return 4 * FP64 + sums * FP64 + norm_bytes[cell.zero]


def wanted(cell: Cell, choices: list[torch.Tensor], rank: int) -> dict[str, int]:
    found = zero_bytes(cell) + ep_bytes(cell, choices, rank) + Counter({"small all-reduce": small_bytes(cell)})
    for j in range(cell.micro_batches):
        found += cp_bytes(cell, rank // cell.cp * cell.micro_batches + j)
    return dict(found)


CELLS = [
    *(Cell(stage, 2, zero) for stage in ("pretrain", "dense_warmup", "sparse_adapt") for zero in (0, 1, 2, 3)),
    Cell("sparse_adapt", 2, 1, ep=2),
    Cell("sparse_adapt", 2, 3, ep=2),
    Cell("sparse_adapt", 2, 2, ep=2, cp=2),
    Cell("sparse_adapt", 2, 3, ep=2, cp=2),
    Cell("dense_warmup", 2, 1, ep=2, cp=2),
    Cell("dense_warmup", 2, 3, ep=2, cp=2),
    Cell("sparse_adapt", 4, 2, ep=2, cp=2),  # every expert on two ranks
    Cell("sparse_adapt", 4, 3, ep=2, cp=2),
    Cell("sparse_adapt", 2, 0, micro_batches=2),
    Cell("sparse_adapt", 4, 1, ep=2, micro_batches=2),
    Cell("sparse_adapt", 2, 2, micro_batches=2),
    Cell("sparse_adapt", 2, 3, micro_batches=2),
    Cell("sparse_adapt", 3, 1),  # sizes that do not divide
    Cell("sparse_adapt", 3, 3),
    Cell("sparse_adapt", 2, 1, ep=2, cp=2, checkpointing=True),
    Cell("pretrain", 2, 3, window=False),
    Cell("dense_warmup", 2, 3, window=False, checkpointing=True),
    Cell("sparse_adapt", 2, 3, window=False),
    Cell("sparse_adapt", 2, 3, ep=2, cp=2, micro_batches=2, window=False, checkpointing=True),
    Cell("sparse_adapt", 2, 3, micro_batches=2, window=False, persist_below=1000),
    Cell("sparse_adapt", 2, 3, ep=2, cp=2, precision="bf16"),
]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_step_moves_the_bytes_of_the_formulas(cell: Cell) -> None:
    answers = run_ranks(take_step, cell.world, cell)
    choices = [chosen for _, chosen in answers]
    for rank, (found, _) in enumerate(answers):
        assert found == wanted(cell, choices, rank), rank


@pytest.mark.parametrize("cp", [2, 4])
def test_context_parallelism_moves_latents_and_index_keys_alone(cp: int) -> None:
    """ZeRO 0 gathers and scatters nothing itself."""
    latents, keys = LAYERS * T * LATENT * FP32, LAYERS * T * KEY * FP32
    for stage, back in (("sparse_adapt", latents + keys), ("dense_warmup", keys)):  # a frozen trunk takes no gradient
        for found, _ in run_ranks(take_step, cp, Cell(stage, cp, 0, cp=cp)):
            assert (found["all-gather"], found["reduce-scatter"]) == (latents + keys, back)
            assert "all-to-all" not in found
