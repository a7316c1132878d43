"""The engine of pipeline parallelism, behind the interface of `train/engine.py`: parts of the model on floors of ranks,
`torch.distributed.pipelining`'s schedules over the micro-batches, ZeRO-1 within a floor.

DeepSpeed's engine wants one backward of one loss on every rank, so it is not here at all. What a part owes to the loss
is made where its layers are:

- A layer's indexer KL and balance loss belong to its part's output: the states that go on carry them as a second
  gradient of one (`_Beside`), so a part's backward begins with what came from the next part and nothing else.
- LM and MTP losses are the last part's. MTP reads the embedding: a V schedule has both ends of the model on floor 0;
  elsewhere the last floor has a copy, whose gradient is added to the first's and which is overwritten after a step.
- Under dense_warmup no gradient passes a layer. A part's KL goes backward within its forward, and forwards alone are
  scheduled.

All losses are parts of a global mean, so gradients are summed over ranks and micro-batches, never averaged.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from conf.schema import RunConfig
from model import ForwardOutput, Transformer
from model.context import Context
from model.transformer import Part
from train import distributed
from train.engine_base import EngineBase, Stretch
from train.losses import Counts, Sums, add_sums, micro_batch_loss
from train.optim import apply_rates
from train.parallel.ep import ExpertParallel, frozen_checksum
from train.parallel.pp import PipelineParallel
from train.parallel.schedules import make_schedule
from train.parallel.zero1 import FlatGroup
from train.precision import training_autocast
from train.stages import STAGES

EMBEDDING = "embed_tokens.weight"


class _Beside(torch.autograd.Function):
    """`hidden` as it is; in backward `loss` gets a gradient of one beside it."""

    @staticmethod
    def forward(ctx, hidden: Tensor, loss: Tensor) -> Tensor:
        return hidden.clone()  # torch detaches what a part returns in place, which views refuse

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, grad.new_ones(())


class _PartModule(nn.Module):
    """What `torch.distributed.pipelining` runs: the modules of one part, by the number of a micro-batch."""

    def __init__(self, engine: PipelineEngine, part: Part, net: Transformer) -> None:
        super().__init__()
        held: list[nn.Module | None] = [net.layers[number] for number in range(part.first, part.end)]
        held += [net.embed_tokens] if part.begins or part.ends else []
        held += [net.norm, net.lm_head, net.mtp] if part.ends else []
        self.held = nn.ModuleList(module for module in held if module is not None)
        self.part, self._run = part, engine.run_part

    def forward(self, hidden: Tensor, which: Tensor) -> Tensor:
        """`hidden` is the number itself where the part begins the model: nothing comes in there."""
        return self._run(self.part, int(which), None if self.part.begins else hidden)


class PipelineEngine(EngineBase):
    """A step is one `run` over all micro-batches of this rank's replica, then `step`."""

    net: Transformer

    def __init__(
        self,
        net: Transformer,
        optimizer: torch.optim.Optimizer,
        config: RunConfig,
        pp: PipelineParallel,
        ep: ExpertParallel,
    ) -> None:
        """`net` is cut by `pp` and `ep`; `optimizer` holds exactly its parameters that require gradients."""
        self.net, self.optimizer, self.pp, self.ep, self.clip = net, optimizer, pp, ep, config.optim.clip
        self.stage, self._train, self._micro_batches = STAGES[config.stage], config.train, config.train.micro_batches
        self._precision = config.precision.name
        assert pp.column is not None and pp.floor is not None, "pp=1 needs no pipeline"
        warnings.filterwarnings(
            "ignore", "`torch.distributed.*is deprecated", FutureWarning
        )  # of names whose successors are new in 2.13
        with torch.device("meta"):
            self._whole = Transformer(config.model).state_dict()  # the shapes of what other floors hold
        self._held = net.state_dict(keep_vars=True)
        ends = [pp.floor_of(0), pp.floor_of(len(pp.parts) - 1)]
        shared = config.model.num_mtp_layers > 0 and ends[0] != ends[1]
        self._ends = [dist.get_global_rank(pp.column, floor) for floor in ends] if shared else []
        self._has_copy = shared and pp.rank == ends[1]
        self._embedding_trains = shared and self.stage.trains_trunk
        frozen: list[int] = [0] * pp.size
        dist.all_gather_object(
            frozen, frozen_checksum(net, leave_out=EMBEDDING if self._has_copy else None), group=pp.column
        )
        self.frozen = sum(frozen) % (1 << 62)
        self.groups: list[FlatGroup] = []
        copy = net.get_parameter(EMBEDDING) if self._has_copy else None
        for group in optimizer.param_groups:
            experts = bool(group.get("moe"))
            own = [p for p in group["params"] if p is not copy]
            self.groups.append(FlatGroup(own, ep.replicas if experts else pp.floor, experts))
            group["params"] = [self.groups[-1].mine]
        self.stages = self._make_stages(config)
        ready = (lambda output, target: output) if self.stage.trunk_grad else None  # the last part gives its loss
        self._schedule = make_schedule(pp.schedule, self.stages, self._micro_batches, ready)
        self._squared = torch.zeros(())
        self._norm = 0.0
        self._batches: Sequence[tuple[dict[str, Tensor], Context]] = []
        self._counts = Counts(1, 1, 1, 1)
        self._sums: Sums = {}
        self._stats = False

    def _make_stages(self, config: RunConfig) -> list[PipelineStage]:
        backward, device = self.stage.trunk_grad, distributed.device()
        # static shapes: torch would otherwise find them by a forward and a backward that must not happen
        states = torch.empty(config.data.seq_len // config.parallel.cp, config.model.hidden_size, device=device)
        states.requires_grad_(backward)
        number, loss = torch.zeros(1, dtype=torch.int64), torch.zeros((), requires_grad=backward)
        stages = []
        for index in self.pp.mine:
            part = self.pp.parts[index]
            stages.append(
                PipelineStage(
                    _PartModule(self, part, self.net),
                    index,
                    len(self.pp.parts),
                    device,
                    input_args=number if part.begins else states,
                    output_args=loss if part.ends else states,
                    group=self.pp.column,
                )
            )
        return stages

    # A step

    def run(self, batches: Sequence[tuple[dict[str, Tensor], Context]], counts: Counts, stats: bool) -> Sums:
        """Forward and backward of all micro-batches (rows of this rank and their place) -> this rank's sums, as of the
        whole model: zero where another rank has the layer. The gradients are reduced then."""
        assert len(batches) == self._micro_batches
        self._batches, self._counts, self._stats, self._sums = batches, counts, stats, {}
        for group in self.groups:
            group.gradients.zero_()
        if self._has_copy and self._embedding_trains:
            copy = self.net.get_parameter(EMBEDDING)
            copy.grad = torch.zeros_like(copy)
        numbers = torch.arange(len(batches))
        mine = [self.pp.parts[index] for index in self.pp.mine]
        args = (numbers,) if any(part.begins for part in mine) else ()
        target = numbers if any(part.ends for part in mine) else None
        self._schedule.step(*args, target=target, return_outputs=False, which=numbers)
        self._batches = []
        self._add_copy()
        self._squared = torch.stack([group.reduce() for group in self.groups]).sum()
        self._norm = float(distributed.sum_over_ranks(self._squared).sqrt())
        return self._sums

    def run_part(self, part: Part, number: int, hidden: Tensor | None) -> Tensor:
        """One forward of one part -> the states for the next one, or the last part's loss."""
        rows, place = self._batches[number]
        stage = self.stage
        if hidden is not None and hidden.requires_grad:
            hidden = hidden.view_as(hidden)  # itself it is a buffer, which lives on and would collect hooks
            hidden.register_hook(Tensor.contiguous)  # its gradient is sent
        with training_autocast(distributed.device(), self._precision):
            out = self.net(
                **rows,
                context=place,
                attention=stage.attention,
                indexer_loss=stage.indexer_loss,
                lm_loss=stage.lm_loss,
                trunk_grad=stage.trunk_grad,
                stats=self._stats and stage.indexer_loss is not None,
                part=part,
                hidden=hidden,
            )
        loss, sums = micro_batch_loss(out, self._counts, stage, self._train)
        add_sums(self._sums, self._placed(part, sums, out))
        if not stage.trunk_grad:
            loss.backward()
            return loss.detach() if part.ends else out.hidden
        return loss if part.ends else _Beside.apply(out.hidden, loss)

    def _placed(self, part: Part, sums: Sums, out: ForwardOutput) -> Sums:
        """Rows of a part's layers where the whole model has them."""
        model = self.net.config
        layers = part.layers + model.num_mtp_layers
        found: Sums = {}
        for name, value in sums.items():
            if name == "kl" or name.startswith("stat/"):
                found[name] = value.new_zeros(layers, *value.shape[1:])
                found[name][part.first : part.first + len(value)] = value
            elif name == "expert_counts":
                first = max(0, part.first - model.first_k_dense_replace)
                found[name] = value.new_zeros(layers - model.first_k_dense_replace, model.n_routed_experts)
                found[name][first : first + len(value)] = value
            else:
                found[name] = value
        return found

    def _add_copy(self) -> None:
        """The gradient of the embedding's copy goes to the embedding."""
        if not self._embedding_trains or distributed.rank() not in self._ends:
            return
        gradient = self.net.get_parameter(EMBEDDING).grad
        assert gradient is not None
        if self._has_copy:
            dist.send(gradient, self._ends[0], group=self.pp.column)
        else:
            other = torch.empty_like(gradient)
            dist.recv(other, self._ends[1], group=self.pp.column)
            gradient += other

    @torch.no_grad()
    def _write_copy(self) -> None:
        if not self._embedding_trains or distributed.rank() not in self._ends:
            return
        embedding = self.net.get_parameter(EMBEDDING)
        if self._has_copy:
            dist.recv(embedding, self._ends[0], group=self.pp.column)
        else:
            dist.send(embedding.detach(), self._ends[1], group=self.pp.column)

    def grad_norm(self) -> float:
        return self._norm if self._norm == self._norm else float("inf")

    def step(self, rates: Mapping[str, float], skip: bool = False) -> None:
        apply_rates(self.optimizer, dict(rates))
        if skip:
            return
        if self.clip and self._norm > self.clip:
            for group in self.groups:
                assert group.mine.grad is not None
                group.mine.grad.mul_(self.clip / (self._norm + 1e-6))
        self.optimizer.step()
        self._loaded()

    def update_router_bias(self, counts: Tensor, speed: float) -> None:
        first, layers = self.net.config.first_k_dense_replace, self.net.config.num_hidden_layers
        held = [number for number in range(first, layers) if self.net.layers[number] is not None]
        rows = [number - first for number in held] + list(range(layers - first, layers - first + len(self.net.mtp)))
        super().update_router_bias(counts[rows], speed)

    # What a checkpoint and an export need

    def trained(self) -> set[str]:
        return set().union(*distributed.gather_objects(super().trained()))

    @property
    def keeps_buffers(self) -> bool:
        return self.pp.place == 0

    def stretches(self, load: bool = False) -> Iterator[Stretch]:
        names = {id(p): name for name, p in self.net.named_parameters()}
        for group in self.groups:
            for p, start, offset, length in group.stretches():
                first = self.ep.rank * p.numel() if group.experts else 0
                yield Stretch(names[id(p)], first + start, length, group.mine, offset)

    def _loaded(self) -> None:
        for group in self.groups:
            group.gather()
        self._write_copy()

    @torch.no_grad()
    def whole(self, name: str, expert: int | None = None) -> Tensor:
        """On rank 0; elsewhere empty."""
        blank = self._whole[name]
        shape, place, held = blank.shape, 0, None
        if expert is not None:
            shape = shape[1:]
            place, held = divmod(expert, blank.shape[0] // self.ep.size)
        source = self.pp.holder(name) * self.pp.breadth + place
        value = torch.empty(0)
        if distributed.rank() == source:
            value = self._held[name].detach()
            value = value if held is None else value[held]
            if source:
                dist.send(value.contiguous(), 0)
        elif distributed.rank() == 0:
            value = torch.empty(shape, dtype=blank.dtype, device=distributed.device())
            dist.recv(value, source)
        return value

    def close(self) -> None:
        """There is nothing to give back: groups of processes end with the process."""
