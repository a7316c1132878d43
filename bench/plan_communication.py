"""What travels between ranks in a step, counted on the collectives: `python -m bench plan` puts train/communication.py
beside it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.plan_memory import Training
from conf.schema import RunConfig
from train.communication import by_collective, flows, scalar_bytes
from train.job import Job

CALLS = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
    "send": "send",
}


class Bytes(TorchDispatchMode):
    """Collective -> bytes of its larger buffer, while active; any other collective is an error. What goes from one rank
    to another counts where it is sent. Within one rank nothing travels: DeepSpeed calls some collectives in groups of
    one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" and function._schema.name != "c10d::recv_":
            name = CALLS[function._schema.name.removeprefix("c10d::")]
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            tensors = [t for arg in args[:2] for t in (arg if isinstance(arg, list) else [arg])]
            largest = max((t for t in tensors if isinstance(t, torch.Tensor)), key=torch.Tensor.numel)
            small = largest.numel() == 1 or largest.dtype == torch.float64
            if group.size() > 1:
                self.found[f"small {name}" if small else name] += largest.numel() * largest.itemsize
        return function(*args, **(kwargs or {}))


def take_step(config: RunConfig) -> dict[str, Any]:
    """On this rank, of one step: bytes by collective, and the experts chosen for its rows, [MoE layers, micro-batches,
    R, K]. Before it ZeRO-3 learns the order of the modules in one step and compares it over the ranks in another, and
    floors find one another."""
    training = Training(config)
    for _ in range(2 if config.parallel.zero == 3 else 1 if config.parallel.pp > 1 else 0):
        training.step()
    routers = training.net.routers()
    chosen: list[list[Tensor]] = [[] for _ in routers]
    for router, calls in zip(routers, chosen, strict=True):
        router.register_forward_hook(lambda _, __, routing, calls=calls: calls.append(routing.experts))
    with Bytes() as counter:
        training.step()
    return {"counted": dict(counter.found), "chosen": torch.stack([torch.stack(calls) for calls in chosen])}


def rows_of(job: Job, choices: list[Tensor], rank: int) -> int:
    """Rows of experts that the rank sends or receives, whichever are more, over layers and micro-batches. `choices`: of
    each rank, as `take_step` gives them."""
    ep = job.parallel.ep
    first = rank - rank % ep
    owners = torch.stack(choices[first : first + ep]) // job.shape.experts  # rank of the group, of each choice
    received = (owners == rank % ep).sum((0, 3, 4))  # [MoE layers, micro-batches]
    return int(received.clamp(min=job.shape.expert_rows).sum())


def predicted(job: Job, rank: int, rows: int | None = None) -> dict[str, int]:
    """Bytes by collective under the counter's names; `rows`: as `flows` takes them."""
    return by_collective(flows(job, rows=rows, floor=rank // job.ranks)) | {"small all-reduce": scalar_bytes(job)}
