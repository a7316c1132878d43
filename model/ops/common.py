"""What the streaming ops share: query blocks over a packed sequence, visibility, stable top-k, ready-made gradients.

A packed sequence holds documents one after another; row t sees keys `doc_start[t] <= s <= t`. A padding row has
`doc_start[t] > t`: it sees nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_BYTES = 32 << 20  # workspace of one query block; with a few such buffers alive an op stays near 100 MB
MAX_BLOCK = 256


@dataclass(frozen=True)
class Block:
    """Query rows [start, stop) and the keys [key_start, stop) that any of them may see."""

    start: int
    stop: int
    key_start: int


def query_blocks(doc_start: Tensor, bytes_per_pair: int, block: int | None = None) -> Iterator[Block]:
    """Cuts the rows of `doc_start` [T] into blocks whose workspace (rows x keys x `bytes_per_pair`) fits BLOCK_BYTES.

    A fixed `block` overrides the budget. Blocks that hold padding alone are left out.
    """
    starts = doc_start.tolist()
    total, row = len(starts), 0
    while row < total:
        rows = block or max(
            1, min(MAX_BLOCK, BLOCK_BYTES // (bytes_per_pair * (row + MAX_BLOCK - min(starts[row], row))))
        )
        stop = min(row + rows, total)
        seen = [starts[t] for t in range(row, stop) if starts[t] <= t]
        if seen:
            yield Block(row, stop, min(seen))
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


def visible(doc_start: Tensor, block: Block) -> Tensor:
    """[rows, keys] bool: which keys of the block each of its rows may see."""
    rows = torch.arange(block.start, block.stop, device=doc_start.device)[:, None]
    keys = torch.arange(block.key_start, block.stop, device=doc_start.device)[None, :]
    return (keys <= rows) & (keys >= doc_start[block.start : block.stop, None])


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 stays fp64 (gradient checks), everything narrower is computed in fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def no_autocast(tensor: Tensor) -> AbstractContextManager:
    """The ops choose their own precision: autocast must not narrow the products inside them."""
    return torch.autocast(tensor.device.type, enabled=False)


def topk_mask(scores: Tensor, valid: Tensor, k: int) -> Tensor:
    """[rows, keys] bool: the k largest valid scores of each row, ties to the LOWEST index; all of them where fewer are
    valid.

    torch.topk leaves the order of ties open, so only its k-th value is used: everything above it is taken, then
    equal scores from the left until k are reached.
    """
    if scores.shape[-1] <= k:
        return valid
    scores = scores.masked_fill(~valid, -torch.inf)
    border = scores.topk(k, dim=-1).values[..., -1:]
    above = scores > border
    equal = scores == border
    room = k - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))) & valid


def mask_to_indices(mask: Tensor, k: int, offset: int = 0) -> Tensor:
    """[rows, k] int64 from a [rows, keys] mask with at most k entries a row: ascending, shifted by `offset`, -1
    behind."""
    indices = torch.full((mask.shape[0], k), -1, dtype=torch.int64, device=mask.device)
    row, key = mask.nonzero(as_tuple=True)
    place = mask.cumsum(-1, dtype=torch.int64)[row, key] - 1
    indices[row, place] = key + offset
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


@dataclass
class IndexKL:
    """Indexer loss of one layer. `kl_sum` is differentiable in q_index, k_index and w; the rest are sums over rows for
    the metrics: `kl_uniform` (over rows with more than one visible key), `mass` and `oracle_mass` (attention mass
    inside the selection, and inside the best possible one), `rows` (rows that see anything)."""

    kl_sum: Tensor
    stats: dict[str, Tensor]
