"""Indexer scores and their top-k in one Triton kernel (DeepSeek-V3.2, eq. 1 and sec. 2.1): scores never leave the chip.

    I[t, s] = sum_h w[t, h] * relu(q[t, h] . k[s])          S_t = top-k of I[t, :] over first[t] <= s <= last[t]

A program owns a few query rows and walks the keys once, left to right. Scores above a row's threshold are appended, in
key order, to the row's candidates in global memory (which stay in L2); a row about to overflow is compacted: the exact
k-th value becomes the threshold, everything above it stays, then equal scores from the left. A later key must beat the
threshold strictly, because everything kept lies to its left: ties go to the lowest index and nothing depends on timing.

Keys are the rows of the product and (query, head) its columns, so that the sum over heads stays inside a thread.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    block_q: int  # query rows of a program
    block_k: int  # keys of a tile
    capacity: int  # candidates a row can hold, a power of two
    num_warps: int
    num_stages: int


def default_config(heads: int, dim: int, itemsize: int, topk: int) -> Config:
    """Hopper: 256 columns a product (more reuse of a key tile than two queries give), two programs a multiprocessor; in
    FP8 keys cost half as much to read, and half the columns with twice the keys are 8% faster."""
    columns, keys = (128, 128) if itemsize == 1 else (256, 64)
    if itemsize > 2 or dim > 128:
        columns, keys = 64, 64
    block_q = max(1, min(16, columns // triton.next_power_of_2(heads)))
    return Config(block_q, keys, scratch_bytes(topk) // 8, 4, 3)


def scratch_bytes(topk: int) -> int:
    """Of the candidates of one row under `default_config`: 8 bytes for each of at least 2 topk."""
    return 8 * max(1024, triton.next_power_of_2(2 * topk))


@triton.jit
def load_queries(q, w, rows, num_rows, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr,
                 BLOCK_D: tl.constexpr):  # fmt: skip
    """q [R, HEADS, DIM], w [R, HEADS] of `rows` [BLOCK_Q] -> [BLOCK_Q * BLOCK_H, BLOCK_D], [BLOCK_Q * BLOCK_H]."""
    BLOCK_Q: tl.constexpr = rows.shape[0]
    head = tl.arange(0, BLOCK_H)
    column = tl.reshape(rows[:, None].to(tl.int64) * HEADS + head[None, :], (BLOCK_Q * BLOCK_H,))
    real = tl.reshape((rows < num_rows)[:, None] & (head < HEADS)[None, :], (BLOCK_Q * BLOCK_H,))
    dim = tl.arange(0, BLOCK_D)
    q_tile = tl.load(q + column[:, None] * DIM + dim[None, :], mask=real[:, None] & (dim < DIM)[None, :], other=0.0)
    return q_tile, tl.load(w + column, mask=real, other=0.0).to(tl.float32)


@triton.jit
def load_keys(k, keys, num_keys, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """k [S, DIM] at `keys` [BLOCK_K] -> [BLOCK_K, BLOCK_D]."""
    dim = tl.arange(0, BLOCK_D)
    real = (keys < num_keys)[:, None] & (dim < DIM)[None, :]
    return tl.load(k + keys[:, None].to(tl.int64) * DIM + dim[None, :], mask=real, other=0.0)


@triton.jit
def score_tile(k_tile, q_tile, w_tile, BLOCK_Q: tl.constexpr, BLOCK_H: tl.constexpr):
    """I of the tile, [BLOCK_K, BLOCK_Q] fp32."""
    products = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
    weighted = tl.maximum(products, 0.0) * w_tile[None, :]
    return tl.sum(tl.reshape(weighted, (k_tile.shape[0], BLOCK_Q, BLOCK_H)), axis=2)


@triton.jit
def order_preserving(x):
    """fp32 -> uint32 in the same order; -0.0 and 0.0 give the same key. No number gives 0."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    flip = (bits >> 31) | -2147483648  # negative: all bits, else the sign alone
    return (bits ^ flip).to(tl.uint32, bitcast=True)


@triton.jit
def compact(buffer, count, topk, CAPACITY: tl.constexpr):
    """Keeps the `topk` best of a row's `count` > topk candidates, in place and in order -> the value of the worst."""
    slot = tl.arange(0, CAPACITY)
    tl.debug_barrier()  # the candidates were written by other threads
    entry = tl.load(buffer + slot, mask=slot < count, other=0)
    value = (entry >> 32).to(tl.uint32)  # 0 behind `count`
    worst, bit = tl.full((), 0, tl.uint32), tl.full((), 1 << 31, tl.uint32)
    for _ in range(32):
        trial = worst | bit
        worst = tl.where(tl.sum((value >= trial).to(tl.int32)) >= topk, trial, worst)
        bit = bit >> 1
    above = value > worst
    equal = (value == worst) & (slot < count)
    room = topk - tl.sum(above.to(tl.int32))
    keep = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    kept = keep.to(tl.int32)
    tl.debug_barrier()  # every thread has read before anyone overwrites
    tl.store(buffer + tl.cumsum(kept, 0) - 1, entry, mask=keep)
    return worst


@triton.jit
def compact_rows(buffer, count, threshold, topk, CAPACITY: tl.constexpr):
    """`compact` for each row of a program; count int32 and threshold uint32 are [BLOCK_Q]."""
    row = tl.arange(0, count.shape[0])
    for r in range(count.shape[0]):
        candidates = tl.sum(tl.where(row == r, count, 0))
        if candidates > topk:
            worst = compact(buffer + r * CAPACITY, candidates, topk, CAPACITY)
            count = tl.where(row == r, topk, count)
            threshold = tl.where(row == r, worst, threshold)
    return count, threshold


@triton.jit(do_not_specialize=["topk"])
def topk_kernel(q, k, w, first, last, k_scale, scratch, out, num_rows, num_keys, topk,
                HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
                BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAPACITY: tl.constexpr):  # fmt: skip
    # Under a causal mask the last rows see most: they go first, and the short ones fill the gaps at the end.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.arange(0, BLOCK_Q)
    rows = block * BLOCK_Q + row
    q_tile, w_tile = load_queries(q, w, rows, num_rows, HEADS, DIM, BLOCK_H, BLOCK_D)
    row_first = tl.load(first + rows, mask=rows < num_rows, other=1)
    row_last = tl.load(last + rows, mask=rows < num_rows, other=0)
    seeing = row_first <= row_last
    start = tl.maximum(tl.min(tl.where(seeing, row_first, num_keys)), 0)
    stop = tl.minimum(tl.max(tl.where(seeing, row_last, -1)) + 1, num_keys)

    buffer = scratch + block.to(tl.int64) * BLOCK_Q * CAPACITY
    count = tl.zeros((BLOCK_Q,), tl.int32)
    threshold = tl.zeros((BLOCK_Q,), tl.uint32)
    begin = start // BLOCK_K * BLOCK_K
    # The tiles between two compactions are a loop of their own, no longer than the free slots allow in the worst case:
    # without a barrier inside, its loads can be pipelined. Below an eighth of free slots that loop would get too short.
    while begin < stop:
        if tl.max(count) > CAPACITY - tl.maximum(CAPACITY // 8, BLOCK_K):
            count, threshold = compact_rows(buffer, count, threshold, topk, CAPACITY)
        end = tl.minimum(stop, begin + (CAPACITY - tl.max(count)) // BLOCK_K * BLOCK_K)
        for key in range(begin, end, BLOCK_K):
            keys = key + tl.arange(0, BLOCK_K)
            scores = score_tile(load_keys(k, keys, num_keys, DIM, BLOCK_D), q_tile, w_tile, BLOCK_Q, BLOCK_H)
            if k_scale is not None:
                scale = tl.load(k_scale + keys, mask=keys < num_keys, other=0.0)
                scores *= scale[:, None]
            value = order_preserving(scores)
            visible = (keys[:, None] >= row_first[None, :]) & (keys[:, None] <= row_last[None, :])
            visible &= keys[:, None] < num_keys
            enters = visible & (value > threshold[None, :])
            number = enters.to(tl.int32)
            slot = row[None, :] * CAPACITY + count[None, :] + tl.cumsum(number, 0) - 1
            entry = (value.to(tl.int64) << 32) | keys[:, None].to(tl.int64)
            tl.store(buffer + slot, entry, mask=enters)
            count += tl.sum(number, 0)
        begin = end

    count, threshold = compact_rows(buffer, count, threshold, topk, CAPACITY)
    tl.debug_barrier()
    slot = tl.arange(0, CAPACITY)
    for r in range(BLOCK_Q):
        found = tl.sum(tl.where(row == r, count, 0))
        entry = tl.load(buffer + r * CAPACITY + slot, mask=slot < found, other=-1)
        target = block * BLOCK_Q + r
        position = entry.to(tl.int32)  # the lower half; -1 where there is no entry
        tl.store(out + target.to(tl.int64) * topk + slot, position, mask=(slot < topk) & (target < num_rows))


def topk(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    first: Tensor,
    last: Tensor,
    topk: int,
    k_scale: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """The `topk` best visible keys of each row -> int32 [R, topk], ascending, -1 behind.

    Args: q [R, Hi, di], k [S, di] in fp32, bf16, fp16 or float8_e4m3fn; w [R, Hi] (with q's scales for float8);
        first, last int32 [R]: row t sees first[t] <= s <= last[t], nothing where first > last; k_scale fp32 [S]: the
        scores of a key are multiplied by it. All contiguous. Scratch: 8 * capacity bytes a row (capacity: the power of
        two from 2 topk), so the caller bounds R.
    """
    (num_rows, heads, dim), num_keys = q.shape, k.shape[0]
    c = config or default_config(heads, dim, q.element_size(), topk)
    block_h, block_d = triton.next_power_of_2(heads), max(32, triton.next_power_of_2(dim))
    block_q = max(c.block_q, 16 // block_h)  # a product has at least 16 columns
    capacity = max(c.capacity, triton.next_power_of_2(2 * topk), 2 * c.block_k)
    blocks = triton.cdiv(num_rows, block_q)
    scratch = torch.empty(blocks * block_q * capacity, dtype=torch.int64, device=q.device)
    out = torch.empty((num_rows, topk), dtype=torch.int32, device=q.device)
    if num_rows:
        topk_kernel[(blocks,)](
            q, k, w, first, last, k_scale, scratch, out, num_rows, num_keys, topk, heads, dim, block_h, block_d,
            block_q, c.block_k, capacity, num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
    return out
