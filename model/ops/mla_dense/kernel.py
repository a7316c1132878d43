"""Dense attention with its log-sum-exp as a Triton kernel: flash attention's forward (Dao 2023, algorithm 1).

For the dense warm-up, whose trunk has no gradient: the output goes on to the next layer and the log-sum-exp turns the
logits of the loss's own pass into probabilities. Departures: queries and keys are wider than values (192 and 128), and
every row has its own window [first, last] of keys, so that packed documents and a rank's queries among gathered keys
are one case. Keys that all rows of a tile see are walked without a mask. There is no backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Config(NamedTuple):
    rows: int  # query rows of a tile
    keys: int  # keys of a tile
    num_warps: int
    num_stages: int


def default_config(itemsize: int) -> Config:
    return Config(128, 64, 8, 3) if itemsize <= 2 else Config(32, 32, 4, 2)


def split_width(width: int) -> tuple[int, int]:
    """A width as a block of the largest power of two in it and one for the rest (0: none), both at least 16."""
    main = max(16, triton.next_power_of_2(width + 1) // 2)
    return main, max(16, triton.next_power_of_2(width - main)) if width > main else 0


@triton.jit
def visible_keys(first, last, rows, num_rows, key_start, key_stop):
    """first, last [BLOCK] of `rows`, and the range of keys within [key_start, key_stop) that any of them sees."""
    row_first = tl.load(first + rows, mask=rows < num_rows, other=1)
    row_last = tl.load(last + rows, mask=rows < num_rows, other=0)
    seeing = row_first <= row_last
    start = tl.maximum(tl.min(tl.where(seeing, row_first, key_stop)), key_start)
    stop = tl.minimum(tl.max(tl.where(seeing, row_last + 1, key_start)), key_stop)
    return row_first, row_last, start, tl.maximum(stop, start)


@triton.jit
def logits_tile(q_main, q_rest, k_rows, real, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """q . k [rows, keys] fp32, from query tiles and pointers to the keys' rows [keys]."""
    main, rest = tl.arange(0, MAIN), MAIN + tl.arange(0, REST if REST else 16)
    k_main = tl.load(k_rows[:, None] + main[None, :], mask=real[:, None] & (main < DIM)[None, :], other=0.0)
    logits = tl.dot(q_main, tl.trans(k_main), input_precision="ieee")
    if REST:
        k_rest = tl.load(k_rows[:, None] + rest[None, :], mask=real[:, None] & (rest < DIM)[None, :], other=0.0)
        logits = tl.dot(q_rest, tl.trans(k_rest), logits, input_precision="ieee")
    return logits


@triton.jit
def _walk(acc, total, top, q_main, q_rest, k, v, row_first, row_last, start, stop, h, factor,
          HEADS: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
          BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """The online softmax (base 2) over keys [start, stop)."""
    value = tl.arange(0, BLOCK_V)
    for key in range(start, stop, BLOCK_N):
        keys = key + tl.arange(0, BLOCK_N)
        real = keys < stop
        place = keys.to(tl.int64) * HEADS + h
        s = logits_tile(q_main, q_rest, k + place * DIM, real, DIM, MAIN, REST) * factor
        if MASKED:
            visible = (keys[None, :] >= row_first[:, None]) & (keys[None, :] <= row_last[:, None]) & real[None, :]
            s = tl.where(visible, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen so far: exp2(-inf), not exp2(nan)
        p = tl.exp2(s - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(p, axis=1)
        top = new_top
        v_mask = real[:, None] & (value < VALUE)[None, :]
        v_tile = tl.load(v + (place * VALUE)[:, None] + value[None, :], mask=v_mask, other=0.0)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision="ieee")
    return acc, total, top


@triton.jit
def forward_kernel(q, k, v, first, last, out, lse, scale, num_rows, num_keys,
                   HEADS: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
                   BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """One tile of rows and one head."""
    h = tl.program_id(0) % HEADS
    # Under a causal mask the last rows see most: they go first, and the short ones fill the gaps at the end.
    block = tl.num_programs(0) // HEADS - 1 - tl.program_id(0) // HEADS
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_real = rows < num_rows
    row_first, row_last, start, stop = visible_keys(first, last, rows, num_rows, 0, num_keys)
    main, rest, value = tl.arange(0, MAIN), MAIN + tl.arange(0, REST if REST else 16), tl.arange(0, BLOCK_V)
    place = rows.to(tl.int64) * HEADS + h
    q_rows = q + place[:, None] * DIM
    q_main = tl.load(q_rows + main[None, :], mask=row_real[:, None] & (main < DIM)[None, :], other=0.0)
    q_rest = q_main
    if REST:
        q_rest = tl.load(q_rows + rest[None, :], mask=row_real[:, None] & (rest < DIM)[None, :], other=0.0)
    # [left, right): whole tiles that every row sees, rows that see nothing making it empty.
    left = tl.max(tl.where(row_real, row_first, 0))
    left = tl.minimum(start + tl.cdiv(tl.maximum(left - start, 0), BLOCK_N) * BLOCK_N, stop)
    right = tl.min(tl.where(row_real, row_last + 1, stop))
    right = left + tl.maximum(tl.minimum(right, stop) - left, 0) // BLOCK_N * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    total, top = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), float("-inf"), tl.float32)
    factor = scale * LOG2_E
    acc, total, top = _walk(acc, total, top, q_main, q_rest, k, v, row_first, row_last, start, left, h, factor,
                            HEADS, DIM, VALUE, MAIN, REST, BLOCK_V, BLOCK_N, True)  # fmt: skip
    acc, total, top = _walk(acc, total, top, q_main, q_rest, k, v, row_first, row_last, left, right, h, factor,
                            HEADS, DIM, VALUE, MAIN, REST, BLOCK_V, BLOCK_N, False)  # fmt: skip
    acc, total, top = _walk(acc, total, top, q_main, q_rest, k, v, row_first, row_last, right, stop, h, factor,
                            HEADS, DIM, VALUE, MAIN, REST, BLOCK_V, BLOCK_N, True)  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # a row that sees nothing: acc is 0 and top is -inf
    o_mask = row_real[:, None] & (value < VALUE)[None, :]
    o_place = out + (place * VALUE)[:, None] + value[None, :]
    tl.store(o_place, (acc / total[:, None]).to(out.dtype.element_ty), mask=o_mask)
    tl.store(lse + place, (top + tl.log2(total)) * LN_2, mask=row_real)


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, first: Tensor, last: Tensor, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of every row over the keys first[t] <= s <= last[t] (none where first > last).

    Args: q [R, H, Dqk], k [S, H, Dqk], v [S, H, Dv] of one dtype, first, last int32 [R]. All contiguous.
    Returns: out [R, H, Dv] in q's dtype and the natural log-sum-exp of the scaled logits, fp32 [R, H]; a row that sees
        nothing has out 0 and lse -inf.
    """
    (num_rows, heads, dim), num_keys, value = q.shape, k.shape[0], v.shape[2]
    assert all(t.is_contiguous() for t in (q, k, v, first, last)) and q.dtype == k.dtype == v.dtype
    assert k.shape == (num_keys, heads, dim) and v.shape[:2] == k.shape[:2], (q.shape, k.shape, v.shape)
    c = config or default_config(q.element_size())
    out = torch.empty(num_rows, heads, value, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_rows, heads, dtype=torch.float32, device=q.device)
    if num_rows:
        forward_kernel[(triton.cdiv(num_rows, c.rows) * heads,)](
            q, k, v, first, last, out, lse, scale, num_rows, num_keys, heads, dim, value, *split_width(dim),
            max(16, triton.next_power_of_2(value)), c.rows, c.keys, num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
    return out, lse
