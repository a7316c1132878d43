"""Expert parallelism: `ep` neighbouring ranks share the routed experts of every layer, each holding E / ep of them.

Tokens travel to their experts and back by all-to-all with the exact counts of each pair of ranks: there is no capacity,
so no token is dropped, and an expert or a rank without tokens is an empty message.

For the gradients DeepSpeed must know that these parameters are no replicas of rank 0's: it reduces them over the ranks
that hold the same experts. It asks for that in a private way (checked with 0.19.8, which is pinned): attributes on the
parameters, groups of its own, and an instance of `AutoEPMoELayer` somewhere in the model. Without the last, ZeRO-3
trains silently wrong. Beside the engine this is the one file that knows DeepSpeed.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import Transformer
from model.moe import MoE, Routing, combine, sort_by_expert
from train import distributed
from train.parallel.pp import own_group
from train.parallel.zero3 import held, is_cut


class ExpertParallel:
    """This rank's place among the `size` ranks that share the experts. Every rank makes one at the same time."""

    def __init__(self, size: int, pp: int = 1) -> None:
        world = distributed.world_size()
        assert world % (size * pp) == 0, f"ep={size} and pp={pp} in a world of {world}"
        self.size, self.rank = size, distributed.rank() % size
        self.name = f"ep_size_{size}"
        self.group: dist.ProcessGroup | None = None
        if size > 1 and pp > 1:  # DeepSpeed is not there, and its groups would reach over all floors
            breadth = world // pp
            self.group = own_group(range(first, first + size) for first in range(0, world, size))
            places = [range(k * breadth + i, (k + 1) * breadth, size) for k in range(pp) for i in range(size)]
            self.replicas = own_group(places)
        elif size > 1:
            from train.engine import import_deepspeed

            deepspeed = import_deepspeed()
            deepspeed.init_distributed(verbose=False)  # finds the process group that is up
            from deepspeed.utils import groups

            if self.name not in groups._get_expert_parallel_group_dict():
                groups._create_expert_and_data_parallel(size)
            self.group = groups._get_expert_parallel_group(self.name)
            self.replicas = groups._get_expert_data_parallel_group(self.name)  # the ranks with the same experts

    def cut(self, net: Transformer) -> None:
        """Leaves this rank its experts, on the meta device or with their values, and hands tokens around from now on.

        E must divide by the size (conf/validate.py).
        """
        if self.group is None:
            return
        dispatch = AllToAll(self.group, self.size)
        for module in net.modules():
            if not isinstance(module, MoE):
                continue
            module.dispatcher = dispatch
            count = module.num_experts // self.size
            module.experts.first = self.rank * count
            for name, p in module.experts.named_parameters(recurse=False):
                mine = p.detach()[module.experts.first :][:count]
                part = nn.Parameter(mine if p.is_meta else mine.clone(), p.requires_grad)
                part.allreduce, part.group_name = False, self.name  # type: ignore[attr-defined]
                part.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
                part.ds_zero_partition_group_name = self.name  # type: ignore[attr-defined]
                part.ds_zero_partition_process_group = self.replicas  # type: ignore[attr-defined]
                setattr(module.experts, name, part)


def expert_group(net: nn.Module) -> dist.ProcessGroup:
    """The ranks that share this rank's experts out among them; of a model that was cut."""
    return next(m.dispatcher.group for m in net.modules() if isinstance(m, MoE) and isinstance(m.dispatcher, AllToAll))


@torch.no_grad()
def frozen_checksum(net: nn.Module, leave_out: str | None = None) -> int:
    """Sum of the bit patterns of all fp32 weights that do not train, the same however they are cut: changed weights
    change it. `leave_out`: the name of one. All ranks call it."""
    whole, shared, cut = torch.zeros(3, dtype=torch.int64, device=distributed.device()).unbind()
    for name, p in net.named_parameters():
        if not p.requires_grad and p.dtype == torch.float32 and name != leave_out:
            bits = held(p).view(torch.int32).sum(dtype=torch.int64).to(whole.device)
            (cut if is_cut(p) else shared if hasattr(p, "group_name") else whole).add_(bits)
    if any(hasattr(p, "group_name") for p in net.parameters()):
        dist.all_reduce(shared, group=expert_group(net))
    dist.all_reduce(cut)  # every value of it is held once
    return int(whole + shared + cut) % (1 << 62)  # the sums wrap at 2^64


def mark(net: nn.Module, zero: int) -> None:
    """Lets DeepSpeed see the expert parallel layers. Frozen experts have nothing to reduce, and ZeRO 1 and 2 refuse
    layers without an optimiser group; ZeRO-3 needs them to cut the parameters over the right ranks."""
    for module in net.modules():
        if isinstance(module, MoE) and isinstance(module.dispatcher, AllToAll):
            if zero == 3 or module.experts.w1.requires_grad:
                module.__class__ = _marked_layer()


@cache
def _marked_layer() -> type[MoE]:
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    class ExpertParallelMoE(MoE, AutoEPMoELayer):
        """Our layer under the marker; everything is ours, and the groups are there already."""

        def set_deepspeed_parallelism(self, *_: object, **__: object) -> None:
            return None

    return ExpertParallelMoE


class AllToAll:
    """A `TokenDispatcher` over the ranks of `group`, which hold E / size experts each, in order."""

    def __init__(self, group: dist.ProcessGroup, size: int) -> None:
        self.group, self.size = group, size

    def __call__(self, x: Tensor, routing: Routing, experts: nn.Module, num_experts: int) -> Tensor:
        order, counts = sort_by_expert(routing, num_experts)
        mine = num_experts // self.size
        incoming = torch.empty_like(counts)  # [size * mine]: rows of each source rank for each of our experts
        dist.all_to_all_single(incoming, counts, group=self.group)
        sent, by_source = counts.view(self.size, mine).sum(1).tolist(), incoming.view(self.size, mine)
        received = by_source.sum(1).tolist()
        rows = _Exchange.apply(x.index_select(0, order // routing.experts.shape[1]), sent, received, self.group)
        expert = torch.arange(mine, device=x.device).repeat(self.size).repeat_interleave(incoming)
        by_expert = expert.argsort(stable=True)
        out = experts(rows.index_select(0, by_expert), by_source.sum(0))
        home = out.index_select(0, by_expert.argsort())  # in the order of arrival
        return combine(x, routing, order, _Exchange.apply(home, received, sent, self.group))


class _Exchange(torch.autograd.Function):
    """Uneven all-to-all of rows [N, D]; backward sends the gradients the way back."""

    @staticmethod
    def forward(ctx, x, sent, received, group):
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(x, sent, received, group)

    @staticmethod
    def backward(ctx, grad):
        return _exchange(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    found = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(found, x.contiguous(), received, sent, group=group)
    return found
