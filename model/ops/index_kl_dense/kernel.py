"""The tiles of the dense warm-up loss in Triton: indexer scores, the attention target, the indexer's gradient (eq. 3).

A chunk of R query rows meets keys [key_start, key_stop). With g = dL/dI, and x[t, h, s] = q[t, h] . k[s] made again:

    I[t, s] = sum_h w[t, h] relu(x[t, h, s])             p[t, s] = 1/H sum_h exp(scale * q[t, h] . k[s, h] - lse[t, h])
    u[t, h] = sum_s g[t, s] [x[t, h, s] > 0] k[s]        d_q[t, h] = w[t, h] u[t, h]      d_w[t, h] = q[t, h] . u[t, h]
    d_k[s]  = sum_{t, h} g[t, s] w[t, h] [x[t, h, s] > 0] q[t, h]

Departure from the README's derivation: d_w = sum_s g relu(x) is read off u, since relu(x) = [x > 0] x. One kernel walks
the keys for d_q and d_w, another the rows for d_k, so there are no atomics and every sum has one order. Factors of a
product (g with its mask, g w with its mask) are rounded to the inputs' dtype, as flash attention rounds P and dS; sums
are fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops.index_topk.kernel import load_keys, load_queries, score_tile
from model.ops.mla_dense.kernel import LOG2_E, Config, logits_tile, split_width, visible_keys

FILL_WIDTH = tl.constexpr(512)


def _rows_for(columns: int, heads: int) -> int:
    """Query rows so that (row, head) pairs make `columns` columns of a product, and never fewer than 16."""
    padded = triton.next_power_of_2(heads)
    return max(1, min(16, columns // padded), 16 // padded)


def scores_config(heads: int, itemsize: int) -> Config:
    return Config(_rows_for(256 if itemsize <= 2 else 64, heads), 64, 4, 3)


def target_config(itemsize: int) -> Config:
    return Config(128, 128, 8, 2) if itemsize <= 2 else Config(32, 32, 4, 2)


def backward_config(heads: int, itemsize: int) -> tuple[Config, Config]:
    """Of the kernel that sums over keys (d_q, d_w) and of the one that sums over rows (d_k)."""
    if itemsize > 2:
        return Config(_rows_for(32, heads), 32, 4, 2), Config(_rows_for(32, heads), 32, 4, 2)
    return Config(_rows_for(64, heads), 128, 4, 3), Config(_rows_for(128, heads), 64, 4, 3)


@triton.jit
def fill(out, rows, num_rows, start, stop, width, value):
    """out[rows, start:stop] = value, for out [num_rows, width]."""
    for column in range(start, stop, FILL_WIDTH):
        columns = column + tl.arange(0, FILL_WIDTH)
        real = (rows < num_rows)[:, None] & (columns < stop)[None, :]
        tile = tl.full((rows.shape[0], FILL_WIDTH), value, tl.float32)
        tl.store(out + rows[:, None].to(tl.int64) * width + columns[None, :], tile, mask=real)


@triton.jit
def scores_kernel(q, k, w, first, last, out, num_rows, key_start, key_stop, keys_per_program,
                  HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """out[t, s - key_start] for BLOCK_Q rows and `keys_per_program` keys."""
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    width = key_stop - key_start
    part_start = key_start + tl.program_id(1) * keys_per_program
    part_stop = tl.minimum(part_start + keys_per_program, key_stop)
    row_first, row_last, start, stop = visible_keys(first, last, rows, num_rows, part_start, part_stop)
    fill(out, rows, num_rows, part_start - key_start, start - key_start, width, float("-inf"))
    fill(out, rows, num_rows, stop - key_start, part_stop - key_start, width, float("-inf"))
    q_tile, w_tile = load_queries(q, w, rows, num_rows, HEADS, DIM, BLOCK_H, BLOCK_D)
    for key in range(start, stop, BLOCK_K):
        keys = key + tl.arange(0, BLOCK_K)
        scores = score_tile(load_keys(k, keys, stop, DIM, BLOCK_D), q_tile, w_tile, BLOCK_Q, BLOCK_H)
        visible = (keys[:, None] >= row_first[None, :]) & (keys[:, None] <= row_last[None, :])
        real = (keys < stop)[:, None] & (rows < num_rows)[None, :]
        place = rows[None, :].to(tl.int64) * width + (keys - key_start)[:, None]
        tl.store(out + place, tl.where(visible, scores, float("-inf")), mask=real)


def scores(
    q_index: Tensor,
    k_index: Tensor,
    w: Tensor,
    first: Tensor,
    last: Tensor,
    key_start: int,
    key_stop: int,
    config: Config | None = None,
) -> Tensor:
    """Indexer scores of the chunk -> fp32 [R, key_stop - key_start], -inf where not visible.

    Args: q_index [R, Hi, di], k_index [S, di], w [R, Hi]; first, last int32 [R]: row t sees first[t] <= s <= last[t].
        All contiguous.
    """
    num_rows, heads, dim = q_index.shape
    c = config or scores_config(heads, q_index.element_size())
    out = torch.empty((num_rows, key_stop - key_start), dtype=torch.float32, device=q_index.device)
    if out.numel():
        keys_per_program = 64 * c.keys  # long enough to pay for the queries, short enough for an even load
        grid = (triton.cdiv(num_rows, c.rows), triton.cdiv(key_stop - key_start, keys_per_program))
        scores_kernel[grid](
            q_index, k_index, w, first, last, out, num_rows, key_start, key_stop, keys_per_program, heads, dim,
            triton.next_power_of_2(heads), _padded(dim), c.rows, c.keys, num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
    return out


@triton.jit
def target_kernel(q, k, lse, first, last, out, scale, num_rows, num_keys, key_start, key_stop,
                  HEADS: tl.constexpr, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """out[t, s - key_start] for a tile; DIM is read as a block of MAIN and one of REST (0: none). lse is [HEADS, R]."""
    width = key_stop - key_start
    # Tiles that run at the same time form a square of GROUP row blocks, so that they share their q and k in L2.
    row_block, key_block = tl.swizzle2d(
        tl.program_id(0) // tl.cdiv(width, BLOCK_N), tl.program_id(0) % tl.cdiv(width, BLOCK_N),
        tl.cdiv(num_rows, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP,
    )  # fmt: skip
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = key_start + key_block * BLOCK_N + tl.arange(0, BLOCK_N)
    tile_start = key_start + key_block * BLOCK_N
    tile_stop = tl.minimum(tile_start + BLOCK_N, key_stop)
    row_first, row_last, start, stop = visible_keys(first, last, rows, num_rows, tile_start, tile_stop)
    place = out + rows[:, None].to(tl.int64) * width + (keys - key_start)[None, :]
    real = (rows < num_rows)[:, None] & (keys < key_stop)[None, :]
    p = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if start < stop:
        main, rest = tl.arange(0, MAIN), MAIN + tl.arange(0, REST if REST else 16)
        q_rows = q + rows[:, None].to(tl.int64) * HEADS * DIM
        k_rows = k + keys.to(tl.int64) * HEADS * DIM
        row_real = (rows < num_rows)[:, None]
        for h in range(HEADS):
            q_tile = tl.load(q_rows + h * DIM + main[None, :], mask=row_real & (main < DIM)[None, :], other=0.0)
            q_rest = q_tile
            if REST:
                q_rest = tl.load(q_rows + h * DIM + rest[None, :], mask=row_real & (rest < DIM)[None, :], other=0.0)
            logits = logits_tile(q_tile, q_rest, k_rows + h * DIM, keys < num_keys, DIM, MAIN, REST)
            row_lse = tl.load(lse + h * num_rows + rows, mask=rows < num_rows, other=float("-inf"))
            row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)  # a row without keys has p = 0
            p += tl.exp2(logits * (scale * LOG2_E) - (row_lse * LOG2_E)[:, None])
        visible = (keys[None, :] >= row_first[:, None]) & (keys[None, :] <= row_last[:, None])
        p = tl.where(visible, p * (1.0 / HEADS), 0.0)
    tl.store(place, p, mask=real)


def target(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    first: Tensor,
    last: Tensor,
    key_start: int,
    key_stop: int,
    config: Config | None = None,
) -> Tensor:
    """The mean over heads of dense attention's probabilities -> fp32 [R, key_stop - key_start], 0 where not visible.

    Args: q [R, H, Dqk], k [S, H, Dqk], lse fp32 [R, H], the natural log-sum-exp of the scaled logits (-inf: the row is
        0); first, last int32 [R]: row t sees first[t] <= s <= last[t]. All contiguous.
    """
    num_rows, heads, dim = q.shape
    c = config or target_config(q.element_size())
    width = key_stop - key_start
    out = torch.empty((num_rows, width), dtype=torch.float32, device=q.device)
    if out.numel():
        grid = (triton.cdiv(num_rows, c.rows) * triton.cdiv(width, c.keys),)
        target_kernel[grid](
            q, k, lse.t().contiguous(), first, last, out, scale, num_rows, k.shape[0], key_start, key_stop, heads, dim,
            *split_width(dim), c.rows, c.keys, 8, num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
    return out


@triton.jit
def backward_rows_kernel(q, k, w, d_scores, d_q, d_w, num_rows, key_start, width,
                         HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
                         BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """d_q and d_w of BLOCK_Q rows: walks the keys."""
    COLUMNS: tl.constexpr = BLOCK_Q * BLOCK_H
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_tile, w_tile = load_queries(q, w, rows, num_rows, HEADS, DIM, BLOCK_H, BLOCK_D)
    u = tl.zeros((COLUMNS, BLOCK_D), tl.float32)
    for column in range(0, width, BLOCK_K):
        columns = column + tl.arange(0, BLOCK_K)
        k_tile = load_keys(k, key_start + columns, key_start + width, DIM, BLOCK_D)
        real = (rows < num_rows)[:, None] & (columns < width)[None, :]
        g = tl.load(d_scores + rows[:, None].to(tl.int64) * width + columns[None, :], mask=real, other=0.0)
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        g = tl.broadcast_to(g.to(k_tile.dtype)[:, None, :], (BLOCK_Q, BLOCK_H, BLOCK_K))
        gate = tl.where(products > 0.0, tl.reshape(g, (COLUMNS, BLOCK_K)), 0.0)
        u = tl.dot(gate.to(k_tile.dtype), k_tile, u, input_precision="ieee")
    head, dim = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    place = tl.reshape(rows[:, None].to(tl.int64) * HEADS + head[None, :], (COLUMNS,))
    real = tl.reshape((rows < num_rows)[:, None] & (head < HEADS)[None, :], (COLUMNS,))
    tl.store(d_w + place, tl.sum(u * q_tile.to(tl.float32), axis=1), mask=real)
    tl.store(d_q + place[:, None] * DIM + dim[None, :], u * w_tile[:, None], mask=real[:, None] & (dim < DIM)[None, :])


@triton.jit
def backward_keys_kernel(q, k, w, d_scores, d_k, num_rows, key_start, width,
                         HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
                         BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """d_k of BLOCK_K keys, added to what is there: walks the rows."""
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_tile = load_keys(k, key_start + columns, key_start + width, DIM, BLOCK_D)
    total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for row in range(0, num_rows, BLOCK_Q):
        rows = row + tl.arange(0, BLOCK_Q)
        q_tile, w_tile = load_queries(q, w, rows, num_rows, HEADS, DIM, BLOCK_H, BLOCK_D)
        real = (rows < num_rows)[None, :] & (columns < width)[:, None]
        g = tl.load(d_scores + rows[None, :].to(tl.int64) * width + columns[:, None], mask=real, other=0.0)
        products = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        g = tl.reshape(tl.broadcast_to(g[:, :, None], (BLOCK_K, BLOCK_Q, BLOCK_H)), (BLOCK_K, BLOCK_Q * BLOCK_H))
        gate = tl.where(products > 0.0, g * w_tile[None, :], 0.0)
        total = tl.dot(gate.to(q_tile.dtype), q_tile, total, input_precision="ieee")
    dim = tl.arange(0, BLOCK_D)
    place = d_k + (key_start + columns)[:, None].to(tl.int64) * DIM + dim[None, :]
    real = (columns < width)[:, None] & (dim < DIM)[None, :]
    tl.store(place, tl.load(place, mask=real, other=0.0) + total, mask=real)


def backward(
    q_index: Tensor,
    k_index: Tensor,
    w: Tensor,
    d_scores: Tensor,
    key_start: int,
    d_k: Tensor,
    config: tuple[Config, Config] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients through the scores of the chunk -> fp32 d_q [R, Hi, di], d_w [R, Hi]; d_k fp32 [S, di] is added to.

    Args: q_index [R, Hi, di], k_index [S, di], w [R, Hi], d_scores fp32 [R, keys], whose first column is key
        `key_start`, 0 where not visible. All contiguous. relu'(0) = 0.
    """
    (num_rows, heads, dim), width = q_index.shape, d_scores.shape[1]
    by_rows, by_keys = config or backward_config(heads, q_index.element_size())
    # (row, head) pairs are what d_k's product sums over: at least 16 of them
    by_keys = by_keys._replace(rows=max(by_keys.rows, 16 // triton.next_power_of_2(heads)))
    d_q = torch.empty(q_index.shape, dtype=torch.float32, device=q_index.device)
    d_w = torch.empty((num_rows, heads), dtype=torch.float32, device=q_index.device)
    shapes = (heads, dim, triton.next_power_of_2(heads), _padded(dim))
    if num_rows:
        c = by_rows
        backward_rows_kernel[(triton.cdiv(num_rows, c.rows),)](
            q_index, k_index, w, d_scores, d_q, d_w, num_rows, key_start, width, *shapes, c.rows, c.keys,
            num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
    if num_rows and width:
        c = by_keys
        backward_keys_kernel[(triton.cdiv(width, c.keys),)](
            q_index, k_index, w, d_scores, d_k, num_rows, key_start, width, *shapes, c.rows, c.keys,
            num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
    return d_q, d_w


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))
