"""Weights from rank 0 straight into the servers' processes, tensor by tensor through a process group of their own.

The group has rank 0 as its rank 0 and every process of every server behind it. It is torch's, by nccl between GPUs and
by gloo elsewhere; SGLang joins it as such. vLLM on GPUs speaks NCCL without torch, so there the group is a bare
communicator, which torch makes and broadcasts through as well (`torch.cuda.nccl`).
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NAME = "weight_update_group"  # SGLang's own default; vLLM's protocol has no name
LOOK_S = 2e-4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


class TorchGroup:
    """Rank `rank` of `world_size` in a group that meets at host:port, where rank 0 listens; all make one at the same
    time, and nobody returns before the last. A process is in one of a name at a time."""

    def __init__(
        self, host: str, port: int, rank: int, world_size: int, backend: str, timeout_s: float, name: str = NAME
    ) -> None:
        from torch.distributed.distributed_c10d import Backend, _new_process_group_helper, _world, rendezvous

        limit = timedelta(seconds=timeout_s)
        store, _, _ = next(rendezvous(f"tcp://{host}:{port}", rank, world_size, timeout=limit))
        store.set_timeout(limit)
        # as SGLang makes its own, so that both look for one another under the same keys
        group, _ = _new_process_group_helper(
            world_size,
            rank,
            [],
            Backend(backend),
            dist.PrefixStore(name, store),
            group_name=name,  # type: ignore[arg-type]  # a NewType of str, in some releases
            timeout=limit,
        )
        _world.pg_group_ranks[group] = {each: each for each in range(world_size)}
        self._held: list[Any] = [group, store]  # rank 0's store is the listener: it lives as long as the group

    def broadcast(self, tensor: Tensor, check: Callable[[], None] = lambda: None) -> None:
        """From rank 0 into everybody's `tensor`, in place; `check`, called while it waits, may end it by raising."""
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        work = self._held[0].broadcast([tensor], options)
        while not work.is_completed():
            check()
            time.sleep(LOOK_S)
        work.wait()

    def close(self) -> None:
        """At once. The group itself ends in a thread of its own: gloo's destructor waits for what is in work, which
        where others are gone takes until `timeout_s`, and else the garbage collector would call it wherever it runs."""
        dist.destroy_process_group(self._held[0])
        threading.Thread(target=self._held.clear, name="group's end", daemon=True).start()


class NcclGroup:
    """Rank 0 of a bare NCCL communicator, for vLLM: `unique_id` is what the others join by."""

    def __init__(self) -> None:
        self.unique_id: bytes = torch.cuda.nccl.unique_id()
        self._communicator: Any = None

    def meet(self, world_size: int) -> None:
        self._communicator = torch.cuda.nccl.init_rank(world_size, self.unique_id, 0)
        # each of vLLM's processes sums one number over all ranks as soon as it has joined, and waits for the others to
        one = [torch.zeros(1, device="cuda")]
        torch.cuda.nccl.all_reduce(one, one, streams=[torch.cuda.current_stream()], comms=[self._communicator])
        torch.cuda.current_stream().synchronize()

    def broadcast(self, tensor: Tensor, check: Callable[[], None] = lambda: None) -> None:
        torch.cuda.nccl.broadcast([tensor], 0, [torch.cuda.current_stream()], [self._communicator])
        torch.cuda.current_stream().synchronize()
        check()

    def close(self) -> None:
        self._communicator = None
