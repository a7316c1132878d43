"""Context parallelism: `cp` neighbouring ranks share every sequence, each computing the rows of its slice.

A rank holds two stretches of T / (2 cp) rows, one from each end of the sequence (zig-zag: rank r has stretches r and
2 cp - 1 - r), so that under a causal mask all have the same work. What travels is small and does not grow with the
number of heads: KV latents with their rope keys, index keys, and the counts of the balance loss; their gradients come
back summed (reduce-scatter). Queries, heads and values never move, so no head count limits `cp`.

DeepSpeed sees plain data parallelism over all ranks: the gradient of a sequence is the sum of what its slices give,
exactly as the gradient of a step is the sum of what its sequences give.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from model.context import Context, documents
from train import distributed

T = TypeVar("T")


class ContextParallel:
    """This rank's place: `rank` of `size` within its sequence, `replica` of `replicas` among the data; under pipeline
    parallelism over `pp` floors `copies` ranks see each of its sequences, in `size` slices. Every rank of the world
    makes one at the same time."""

    def __init__(self, size: int, pp: int = 1) -> None:
        world, rank = distributed.world_size(), distributed.rank()
        assert world % (size * pp) == 0, f"cp={size} and pp={pp} in a world of {world}"
        self.size, self.rank, self.copies = size, rank % size, size * pp
        self.replica, self.replicas = rank % (world // pp) // size, world // pp // size
        self.group: dist.ProcessGroup | None = None
        if size > 1:
            for first in range(0, world, size):
                group = dist.new_group(list(range(first, first + size)))
                if first <= rank < first + size:
                    self.group = group

    def gather_objects(self, value: T) -> list[T]:
        """`value` of every rank of this replica, by rank; plain objects and tensors on the CPU."""
        found: list[T] = [value] * self.size
        if self.group is not None:
            dist.all_gather_object(found, value, group=self.group)
        return found

    def share(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Context]:
        """Fields [T] of one packed sequence -> this rank's rows of them [T / size], and what the model asks about them.

        T must divide by 2 * size (conf/validate.py).
        """
        if self.group is None:
            return batch, Context.whole(batch["doc_start"])
        length = batch["doc_start"].shape[0]
        q_pos = zigzag(length, self.size, self.rank).to(batch["doc_start"].device)
        return {name: field[q_pos] for name, field in batch.items()}, _Slice(self, batch["doc_start"], q_pos)


def zigzag(length: int, size: int, rank: int) -> Tensor:
    """Positions of the rows that `rank` of `size` holds, ascending: [length / size] int64."""
    stretch, left = divmod(length, 2 * size)
    assert left == 0, f"{length} rows cannot be cut into {2 * size} stretches"
    rows = torch.arange(stretch)
    return torch.cat([rank * stretch + rows, (2 * size - 1 - rank) * stretch + rows])


class _Slice(Context):
    """One rank's rows of a sequence."""

    def __init__(self, parallel: ContextParallel, doc_start: Tensor, q_pos: Tensor) -> None:
        document, lengths = documents(doc_start)
        super().__init__(doc_start[q_pos], q_pos, document[q_pos], lengths)
        self.parallel = parallel

    def gather(self, x: Tensor) -> Tensor:
        return _Gather.apply(x, self.parallel.group, self.parallel.size)

    def add(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.parallel.group)
        return x


class _Gather(torch.autograd.Function):
    """All-gather of rows into the order of the sequence; backward is the reduce-scatter that belongs to it."""

    @staticmethod
    def forward(ctx, x, group, size):
        ctx.group, ctx.size = group, size
        found = x.new_empty(size * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(found, x.contiguous(), group=group)
        early, late = found.view(size, 2, -1, *x.shape[1:]).unbind(1)
        return torch.cat([early, late.flip(0)]).flatten(0, 1)

    @staticmethod
    def backward(ctx, grad):
        early, late = grad.unflatten(0, (2, ctx.size, -1)).unbind(0)
        by_rank = torch.stack([early, late.flip(0)], 1).flatten(0, 2)
        found = grad.new_empty(grad.shape[0] // ctx.size, *grad.shape[1:])
        dist.reduce_scatter_tensor(found, by_rank, group=ctx.group)
        return found, None, None
