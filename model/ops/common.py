"""What the streaming ops share: query blocks over a packed sequence, visibility, stable top-k, ready-made gradients.

A packed sequence holds documents one after another; row t sees keys `doc_start[t] <= s <= t`. A padding row has
`doc_start[t] > t`: it sees nothing. Where the queries are a part of the sequence (context parallelism), `q_pos[t]` is
the position of row t among the keys, and stands in for t.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.ops.settings import DEFAULT, OpSettings

MAX_ROWS = 256  # of a block in plain torch on a GPU: more gain nothing


@dataclass(frozen=True)
class Block:
    """Query rows [start, stop) and the keys [key_start, key_stop) that any of them may see."""

    start: int
    stop: int
    key_start: int
    key_stop: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def keys(self) -> slice:
        return slice(self.key_start, self.key_stop)

    @property
    def shape(self) -> tuple[int, int]:
        return self.stop - self.start, self.key_stop - self.key_start


def positions(doc_start: Tensor, q_pos: Tensor | None) -> Tensor:
    """The position of every query row among the keys: `q_pos`, or 0, 1, 2, ... where the rows are the sequence."""
    return torch.arange(doc_start.shape[0], device=doc_start.device) if q_pos is None else q_pos


def query_blocks(
    doc_start: Tensor,
    q_pos: Tensor | None,
    bytes_per_pair: int,
    settings: OpSettings = DEFAULT,
    block: int | None = None,
    most: int = MAX_ROWS,
) -> Iterator[Block]:
    """Cuts the rows of `doc_start` [R] into blocks whose workspace (rows x keys x `bytes_per_pair`) fits the budget.

    A block has at least one row and at most `most` (few on a CPU, where it should stay in the caches). A fixed `block`
    overrides all. Blocks that hold padding alone are left out.
    """
    first, last = doc_start.tolist(), positions(doc_start, q_pos).tolist()
    total, row = len(first), 0
    while row < total:
        rows = block
        if rows is None:
            ahead = min(row + most, total) - 1
            row_bytes = bytes_per_pair * max(1, last[ahead] + 1 - min(first[row], last[row]))
            rows = settings.workspace // row_bytes
            rows = max(1, min(rows, most))
        stop = min(row + rows, total)
        seen = [t for t in range(row, stop) if first[t] <= last[t]]
        if seen:
            yield Block(row, stop, min(first[t] for t in seen), max(last[t] for t in seen) + 1)
        row = stop


def segments(doc_start: Tensor) -> list[tuple[int, int]]:
    """Documents of a packed sequence as [start, stop) pairs, padding left out."""
    starts = doc_start.tolist()
    found: list[tuple[int, int]] = []
    for t, start in enumerate(starts):
        if start > t:
            continue
        if found and found[-1][0] == start:
            found[-1] = (start, t + 1)
        else:
            found.append((start, t + 1))
    return found


class Hidden:
    """What the rows of a block may not see. Most keys are visible to every row, so only the columns at both ends are
    masked: `fill` costs nothing that grows with the block's keys."""

    def __init__(self, doc_start: Tensor, q_pos: Tensor | None, block: Block) -> None:
        first, last = doc_start[block.rows], positions(doc_start, q_pos)[block.rows]
        seen = first <= last
        self.empty = None if bool(seen.all()) else ~seen.unsqueeze(1)  # rows of padding
        self.count = (last - first + 1).clamp(min=0)  # [rows]: keys that each row sees
        starts, stops = first[seen], last[seen] + 1
        self.ends: list[tuple[slice, Tensor]] = []
        left, right = int(starts.max()), int(stops.min())
        spans = [(block.key_start, left), (right, block.key_stop)]
        for start, stop in spans if left < right else [(block.key_start, block.key_stop)]:
            if start < stop:
                keys = torch.arange(start, stop, device=first.device)
                hidden = (keys > last.unsqueeze(1)) | (keys < first.unsqueeze(1))
                self.ends.append((slice(start - block.key_start, stop - block.key_start), hidden))

    def fill(self, x: Tensor, value: float) -> Tensor:
        """x [rows, keys] of the block, in place; rows that see nothing are filled throughout."""
        for columns, hidden in self.ends:
            x[:, columns].masked_fill_(hidden, value)
        return x if self.empty is None else x.masked_fill_(self.empty, value)


class Scratch:
    """Named work tensors that every block of an op reuses: fresh pages cost a CPU as much as the product that fills
    them."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.made: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Uninitialised, contiguous; valid until the next call with this name."""
        size = math.prod(shape)
        if name not in self.made or self.made[name].numel() < size:
            self.made.pop(name, None)  # before its successor is made
            self.made[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self.made[name][:size].view(shape)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 stays fp64 (gradient checks), everything narrower is computed in fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def no_autocast(tensor: Tensor) -> AbstractContextManager:
    """The ops choose their own precision: autocast must not narrow the products inside them."""
    return torch.autocast(tensor.device.type, enabled=False)


def short_lived() -> AbstractContextManager:
    """For a graph that is used up within the forward that made it: what it saves stays as it is. Under activation
    checkpointing the hooks of the layer would unpack it by running the layer's forward once more."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


def reaching(scores: Tensor, bound: Tensor) -> Tensor:
    """Flat positions, ascending, of the entries of scores [rows, n] that are at least their row's bound [rows, 1]."""
    if scores.device.type == "cpu":  # numpy compares 4x and lists 3x faster than torch here
        return torch.from_numpy(np.flatnonzero(np.greater_equal(scores.detach().numpy(), bound.numpy())))
    return (scores >= bound).view(-1).nonzero().squeeze(1)


def _lower_bound(scores: Tensor, k: int) -> Tensor:
    """[rows, 1]: at most the k-th largest finite entry of scores [rows, n > k], and rarely much below it.

    The row is folded in halves until about 2k groups are left, each worth its largest member: the k-th largest group
    is reached by at least k entries, and by about 1.4 k in all.
    """
    groups = scores
    while groups.shape[1] >= 4 * k:
        half = groups.shape[1] // 2
        groups = torch.maximum(groups[:, :half], groups[:, half : 2 * half])
    bound = groups.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    return bound.clamp_(min=torch.finfo(scores.dtype).min)


@torch.no_grad()
def select_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row, ties to the LOWEST index; -inf is never taken, NaN is not supported.

    Args: scores [rows, n], contiguous. Returns flat positions (row * n + column, ascending) and the count of each row.

    Exact, and up to 3x cheaper than torch.topk, which also leaves ties open: a lower bound of the k-th largest entry
    leaves few candidates, and the tie rule is applied to those alone.
    """
    rows, n = scores.shape
    if n <= k:
        kept = reaching(scores, scores.new_full((rows, 1), torch.finfo(scores.dtype).min))
        return kept, torch.bincount(kept // max(n, 1), minlength=rows)
    flat = reaching(scores, _lower_bound(scores, k))
    row = flat // n
    counts = torch.bincount(row, minlength=rows)
    width = int(counts.max()) if rows else 0
    if width <= k:
        return flat, counts
    gap = (torch.arange(rows, device=flat.device) + 1) * width - counts.cumsum(0)  # padding before the row's entries
    place = torch.arange(len(flat), device=flat.device) + (gap - width + counts).repeat_interleave(counts)
    candidates = scores.new_full((rows, width), -torch.inf)
    candidates.view(-1).index_copy_(0, place, scores.view(-1).index_select(0, flat))
    border = candidates.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    border.clamp_(min=torch.finfo(scores.dtype).min)
    above, equal = candidates > border, candidates == border
    room = k - above.sum(-1, keepdim=True)
    keep = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
    return flat[keep.view(-1).index_select(0, place)], keep.sum(-1)


def topk_indices(scores: Tensor, k: int, offset: int = 0) -> Tensor:
    """[rows, k] int32: columns of `select_topk`, ascending, shifted by `offset`, -1 behind."""
    flat, counts = select_topk(scores, k)
    columns = (flat % max(scores.shape[1], 1) + offset).int()
    if len(flat) == k * len(counts):
        return columns.view(-1, k)
    indices = torch.full((len(counts), k), -1, dtype=torch.int32, device=scores.device)
    indices[torch.arange(k, device=scores.device) < counts.unsqueeze(1)] = columns
    return indices


class _ReadyGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        gradients = ctx.saved_tensors
        return (None, None, *(grad * g for g in gradients), *(None for _ in gradients))


def with_gradients(value: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A scalar equal to `value` whose gradient in `inputs[i]` is `gradients[i]`, computed beforehand.

    Lets an op make value and gradient in one pass while its blocks exist; backward only scales.
    """
    return _ReadyGradients.apply(value, len(inputs), *inputs, *gradients)


class IndexKL(NamedTuple):
    """Indexer loss of one layer. `kl_sum` is differentiable in q_index, k_index and w; the rest are sums over rows for
    the metrics: `kl_uniform` (over rows with more than one visible key), `mass` and `oracle_mass` (attention mass
    inside the selection, and inside the best possible one), `rows` (rows that see anything)."""

    kl_sum: Tensor
    stats: dict[str, Tensor]
