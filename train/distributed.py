"""The process group and the few collectives the loops need. One process without torchrun is a world of one.

gloo on CPU, nccl on GPU. Started before DeepSpeed, which then uses this group instead of looking for MPI.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import UserError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # rank 0 may tokenise a corpus while the others wait


def env_rank() -> int:
    """Rank that torchrun gave this process, 0 without it; known before any process group."""
    return int(os.environ.get("RANK", "0"))


def env_world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def device() -> torch.device:
    """This process's device: its GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def process_group() -> Iterator[None]:
    """The default process group for the length of the block; an existing one is used and left alone."""
    if dist.is_initialized():
        yield
        return
    where = device()
    if where.type == "cuda":
        torch.cuda.set_device(where)
    backend = "nccl" if where.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torch 2.13 hands a restarted job the store of the attempt before, with addresses of ranks that are dead.
            # The count is the node's own and differs between nodes after a restart: across nodes the launcher must
            # make a store for every attempt (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, as launch/cluster does)
            store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    try:
        yield
    except UserError:  # all ranks raise it alike
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()  # not after a fault: others may be inside a collective, and the process ends anyway


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def barrier() -> None:
    dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of `values` over all ranks, in place; the same bits on every rank."""
    dist.all_reduce(values)
    return values


def max_over_ranks(value: float) -> float:
    held = torch.tensor([value], dtype=torch.float64, device=device())
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return float(held)


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """`value` of every rank, by rank; small plain objects. `group`: a `side_group`, beside the main thread."""
    found: list[T] = [value] * world_size()
    dist.all_gather_object(found, value, group=group)
    return found


def side_group() -> dist.ProcessGroup:
    """All ranks once more, for one thread beside the main one: its collectives cannot meet those of the training.

    gloo, for what is exchanged lies in CPU memory. All ranks call it.
    """
    return dist.new_group(backend="gloo", timeout=TIMEOUT)
