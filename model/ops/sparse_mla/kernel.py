"""Absorbed attention over selected latents as Triton kernels, made for Hopper (DeepSeek-V3.2, eq. 2; README.md).

One row of `kv` serves every head as key (all of it) and as value (its first C columns), so a program is one query row
and a block of heads: it gathers a tile of rows once and the heads are the rows of its matrix products.

The backward pass is two kernels, not one. A fused kernel would hold dq [64, 576] and a tile of dkv in registers and add
every tile to dkv once a block of heads: twice the atomics at 128 heads. Here the first kernel writes P and dS in the
inputs' dtype (4 H k bytes a row in bf16: 1 MiB for V3.2, where one row's contribution to dkv is 4.5), and the second is
plain matrix products over them, a slice of columns a program, with all heads in the contraction: nothing is computed
twice, dkv is added to once a (row, key), and no product feeds another inside a program, which leaves Triton free to
pipeline all loads and to use every warp. In deterministic mode the second kernel writes its tiles to a buffer and
`segment_sum` adds them up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops.scatter_kernel import segment_sum

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SHARED_MEMORY = 220 << 10  # bytes of a Hopper block for tiles; 7 KiB more are left to exchanges between warps


@dataclass(frozen=True)
class Config:
    """Heads and keys of a tile (powers of two from 16), and how Triton compiles the kernel."""

    heads: int
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class BackwardConfig:
    """`scores` makes P and dS; `gradients` makes dq and dkv from them, at most `columns` of their columns a program."""

    scores: Config
    gradients: Config
    columns: int


def _power(size: int, at_most: int = 1 << 20) -> int:
    return max(16, min(at_most, triton.next_power_of_2(size)))


def _keys(at_most: int, resident: int, per_key: int) -> int:
    """Keys of a tile whose two buffers (`per_key` bytes a key each) fit beside `resident` bytes in shared memory."""
    while at_most > 16 and resident + 2 * at_most * per_key > SHARED_MEMORY:
        at_most //= 2
    return at_most


# fp32 products do not run on tensor cores: small tiles, for comparisons. In 16 bits, three stages are two buffers of
# gathered rows, and the indices one step ahead of them: without it every gather would wait for its indices.
# Only the forward kernel measured faster with two (README.md).


def _forward_config(q: Tensor) -> Config:
    if q.element_size() > 2:
        return Config(16, 16, 4, 1)
    heads, row = _power(q.shape[1], 64), 2 * q.shape[2]
    return Config(heads, _keys(64, heads * row, row), 8 if heads == 64 else 4, 2)


def _target_config(q: Tensor) -> Config:
    if q.element_size() > 2:
        return Config(16, 16, 4, 1)
    if q.shape[1] > 128:  # every tile loads all queries again: no room for two buffers of them
        return Config(64, 32, 4, 1)
    heads, row = _power(q.shape[1], 128), 2 * q.shape[2]
    return Config(heads, _keys(64, heads * row, row), 4, 3)


def _backward_config(q: Tensor) -> BackwardConfig:
    if q.element_size() > 2:
        return BackwardConfig(Config(16, 16, 4, 1), Config(16, 16, 4, 1), 64)
    heads, row = _power(q.shape[1], 64), 2 * q.shape[2]
    scores = Config(heads, _keys(64, 2 * heads * row, row), 4, 3)
    return BackwardConfig(scores, Config(_power(q.shape[1], 128), 64, 8, 3), 128)


@triton.jit
def _tile(pointers, rows, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] from row pointers; 0 where `rows` is false or the column is outside WIDTH."""
    if WIDTH == BLOCK:
        mask = rows[:, None] & (column >= 0)[None, :]
    else:
        mask = rows[:, None] & (column < WIDTH)[None, :]
    return tl.load(pointers[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def _last_entry(idx, K: tl.constexpr, BLOCK: tl.constexpr):
    """One past the last real entry of a row of `idx`: short rows cost what they hold, wherever -1 stands."""
    slot = tl.arange(0, BLOCK)
    found = tl.load(idx + slot, mask=slot < K, other=-1)
    return tl.max(tl.where(found >= 0, slot + 1, 0), axis=0)


@triton.jit
def _forward(
    q, kv, idx, out, lse, scale,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Flash attention with an online softmax (base 2 inside) for one query row and BLOCK_H heads."""
    HEAD_BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    t = (tl.program_id(0) // HEAD_BLOCKS).to(tl.int64)
    h = (tl.program_id(0) % HEAD_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
    c, r, slot = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    q_c = _tile(q + (t * H + h) * (C + R), h < H, c, C, BLOCK_C)
    q_r = _tile(q + (t * H + h) * (C + R) + C, h < H, r, R, BLOCK_R)
    idx += t * K
    top = tl.full([BLOCK_H], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    stop = _last_entry(idx, K, ROW)
    factor = scale * LOG2_E
    for start in range(0, stop, BLOCK_K):
        key = tl.load(idx + start + slot, mask=start + slot < K, other=-1)
        rows = kv + key.to(tl.int64) * (C + R)
        k_c = _tile(rows, key >= 0, c, C, BLOCK_C)
        k_r = _tile(rows + C, key >= 0, r, R, BLOCK_R)
        # Always true, but not for the compiler. Where one product feeds the next, Triton lays all warps along heads:
        # with 64 of them two warpgroups would compute the same scores (1.6 times the time). It does not look out of an
        # `if`. The two products are scaled before they are added for the same reason, and the other branch's p is a 0
        # that is no constant: a constant would be kept in shared memory all through the loop.
        if start < stop:
            s = tl.dot(q_c, tl.trans(k_c), input_precision="ieee") * factor
            s += tl.dot(q_r, tl.trans(k_r), input_precision="ieee") * factor
            s = tl.where((key >= 0)[None, :], s, -float("inf"))
            new_top = tl.maximum(top, tl.max(s, axis=1))
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # a tile of -1 alone: exp2(-inf), not exp2(nan)
            p = tl.exp2(s - shift[:, None])
            decay = tl.exp2(top - shift)
            total = total * decay + tl.sum(p, axis=1)
            top = new_top
            p = p.to(k_c.dtype)
        else:
            p = tl.broadcast_to((key < -1)[None, :], (BLOCK_H, BLOCK_K)).to(k_c.dtype)
            decay = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.dot(p, k_c, acc * decay[:, None], input_precision="ieee")
    total = tl.where(total == 0.0, 1.0, total)  # a row with no entry: acc is 0 and top is -inf
    target = out + (t * H + h)[:, None] * C + c[None, :]
    tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=(h < H)[:, None] & (c < C)[None, :])
    tl.store(lse + t * H + h, (top + tl.log2(total)) * LN_2, mask=h < H)


@triton.jit
def _target(
    q, kv, idx, lse, p_mean, scale,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Head-averaged probabilities of one query row, the sum over heads kept inside the program."""
    HEAD_BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    t = tl.program_id(0).to(tl.int64)
    c, r, slot = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    head = tl.arange(0, BLOCK_H)
    if HEAD_BLOCKS == 1:  # the queries stay on the chip
        q_c = _tile(q + (t * H + head) * (C + R), head < H, c, C, BLOCK_C)
        q_r = _tile(q + (t * H + head) * (C + R) + C, head < H, r, R, BLOCK_R)
        log_sum = tl.load(lse + t * H + head, mask=head < H, other=float("inf"))  # inf: a head that is not there adds 0
    for start in range(0, K, BLOCK_K):
        key = tl.load(idx + t * K + start + slot, mask=start + slot < K, other=-1)
        rows = kv + key.to(tl.int64) * (C + R)
        k_c = _tile(rows, key >= 0, c, C, BLOCK_C)
        k_r = _tile(rows + C, key >= 0, r, R, BLOCK_R)
        total = tl.zeros([BLOCK_K], tl.float32)
        for block in tl.static_range(HEAD_BLOCKS):
            if HEAD_BLOCKS > 1:
                h = block * BLOCK_H + head
                q_c = _tile(q + (t * H + h) * (C + R), h < H, c, C, BLOCK_C)
                q_r = _tile(q + (t * H + h) * (C + R) + C, h < H, r, R, BLOCK_R)
                log_sum = tl.load(lse + t * H + h, mask=h < H, other=float("inf"))
            s = tl.dot(q_r, tl.trans(k_r), input_precision="ieee")
            s = tl.dot(q_c, tl.trans(k_c), s, input_precision="ieee")
            total += tl.sum(tl.exp2((s * scale - log_sum[:, None]) * LOG2_E), axis=0)
        tl.store(p_mean + t * K + start + slot, tl.where(key >= 0, total / H, 0.0), mask=start + slot < K)


@triton.jit
def _backward_scores(
    q, kv, idx, out, lse, d_out, p_out, ds_out, scale,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr, PADDED_K: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """P and dS = scale P (dO v - delta) of one query row and BLOCK_H heads, up to the row's last entry (rounded up)."""
    HEAD_BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    t = (tl.program_id(0) // HEAD_BLOCKS).to(tl.int64)
    h = (tl.program_id(0) % HEAD_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
    c, r, slot = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    do = _tile(d_out + (t * H + h) * C, h < H, c, C, BLOCK_C)
    delta = tl.sum(do.to(tl.float32) * _tile(out + (t * H + h) * C, h < H, c, C, BLOCK_C).to(tl.float32), axis=1)
    q_c = _tile(q + (t * H + h) * (C + R), h < H, c, C, BLOCK_C)
    q_r = _tile(q + (t * H + h) * (C + R) + C, h < H, r, R, BLOCK_R)
    log_sum = tl.load(lse + t * H + h, mask=h < H, other=0.0) * LOG2_E
    idx += t * K
    stop = tl.cdiv(_last_entry(idx, K, ROW), ROUND) * ROUND
    place = (t * H + h)[:, None] * PADDED_K + slot[None, :]
    for start in range(0, stop, BLOCK_K):
        key = tl.load(idx + start + slot, mask=start + slot < K, other=-1)
        rows = kv + key.to(tl.int64) * (C + R)
        k_c = _tile(rows, key >= 0, c, C, BLOCK_C)
        k_r = _tile(rows + C, key >= 0, r, R, BLOCK_R)
        s = tl.dot(q_r, tl.trans(k_r), input_precision="ieee")
        s = tl.dot(q_c, tl.trans(k_c), s, input_precision="ieee")
        d_p = tl.dot(do, tl.trans(k_c), input_precision="ieee")
        # before exp2: a zero logit above an lse far below 0 would be inf, and inf times a row of zeros NaN
        p = tl.exp2(tl.where((key >= 0)[None, :], s * (scale * LOG2_E) - log_sum[:, None], -float("inf")))
        ds = p * (d_p - delta[:, None]) * scale
        tl.store(p_out + place + start, p.to(p_out.dtype.element_ty), mask=(h < H)[:, None])
        tl.store(ds_out + place + start, ds.to(ds_out.dtype.element_ty), mask=(h < H)[:, None])


@triton.jit
def _backward_gradients(
    q, kv, idx, d_out, p_in, ds_in, d_q, d_kv, head_start,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr, PADDED_K: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, VALUE: tl.constexpr, ATOMIC: tl.constexpr,
    ROW: tl.constexpr,
):  # fmt: skip
    """dq = dS kv and dkv[idx] += dS^T q + P^T dO for one query row and BLOCK_D columns.

    VALUE: columns of the latent, which is key and value; otherwise the rope columns behind it, which are key alone.
    ATOMIC adds to d_kv [S, C+R]; otherwise d_kv is a buffer [rows, K, C+R] of which each real entry is written.
    """
    WIDTH: tl.constexpr = C if VALUE else R
    BLOCKS: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    t = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = (tl.program_id(0) % BLOCKS) * BLOCK_D + tl.arange(0, BLOCK_D)
    h, slot = head_start + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_K)
    if not VALUE:
        q, kv, d_q, d_kv = q + C, kv + C, d_q + C, d_kv + C
    q_d = _tile(q + (t * H + h) * (C + R), h < H, column, WIDTH, BLOCK_D * BLOCKS)
    if VALUE:
        do = _tile(d_out + (t * H + h) * C, h < H, column, WIDTH, BLOCK_D * BLOCKS)
    idx += t * K
    stop = tl.cdiv(_last_entry(idx, K, ROW), ROUND) * ROUND
    place = (t * H + h)[:, None] * PADDED_K + slot[None, :]
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for start in range(0, stop, BLOCK_K):
        key = tl.load(idx + start + slot, mask=start + slot < K, other=-1)
        k_d = _tile(kv + key.to(tl.int64) * (C + R), key >= 0, column, WIDTH, BLOCK_D * BLOCKS)
        ds = tl.load(ds_in + place + start, mask=(h < H)[:, None], other=0.0)
        acc = tl.dot(ds, k_d, acc, input_precision="ieee")
        # [columns, keys]: 128 rows keep both warpgroups busy where 64 keys would have them compute the same
        d_rows = tl.dot(tl.trans(q_d), ds, input_precision="ieee")
        if VALUE:
            p = tl.load(p_in + place + start, mask=(h < H)[:, None], other=0.0)
            d_rows = tl.dot(tl.trans(do), p, d_rows, input_precision="ieee")
        d_rows = tl.trans(d_rows)
        mask = (key >= 0)[:, None] & (column < WIDTH)[None, :]
        if ATOMIC:
            target = d_kv + key.to(tl.int64)[:, None] * (C + R) + column[None, :]
            tl.atomic_add(target, d_rows, mask=mask, sem="relaxed")
        else:
            target = d_kv + (t * K + start + slot)[:, None] * (C + R) + column[None, :]
            tl.store(target, d_rows, mask=mask)
    target = d_q + (t * H + h)[:, None] * (C + R) + column[None, :]
    tl.store(target, acc.to(d_q.dtype.element_ty), mask=(h < H)[:, None] & (column < WIDTH)[None, :])


def _check(q: Tensor, kv: Tensor, idx: Tensor) -> None:
    assert q.is_contiguous() and kv.is_contiguous() and idx.is_contiguous() and idx.dtype == torch.int32
    assert q.shape[2] == kv.shape[1] and q.shape[0] == idx.shape[0] and q.dtype == kv.dtype, (q.shape, kv.shape)


def forward(
    q: Tensor,
    kv: Tensor,
    idx: Tensor,
    scale: float,
    value_dim: int,
    config: Config | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q [R, H, C+r] over rows idx int32 [R, k] (-1 anywhere: no entry) of kv [S, C+r].

    Returns: out [R, H, C = value_dim] in q's dtype and the natural log-sum-exp of the scaled logits, fp32 [R, H]. A row
    with no entry gives out 0 and lse -inf. `into`: contiguous tensors that take both.
    """
    _check(q, kv, idx)
    (rows, heads, width), k = q.shape, idx.shape[1]
    config = config or _forward_config(q)
    out, lse = into or (
        torch.empty(rows, heads, value_dim, dtype=q.dtype, device=q.device),
        torch.empty(rows, heads, dtype=torch.float32, device=q.device),
    )
    assert out.is_contiguous() and lse.is_contiguous()
    if rows:
        _forward[(rows * triton.cdiv(heads, config.heads),)](
            q, kv, idx, out, lse, scale, heads, value_dim, width - value_dim, k, config.heads, config.keys,
            _power(value_dim), _power(width - value_dim), triton.next_power_of_2(k),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, lse


def target(q: Tensor, kv: Tensor, idx: Tensor, lse: Tensor, scale: float, config: Config | None = None) -> Tensor:
    """What the indexer learns from: the mean over heads of exp(logit - lse), fp32 [R, k]; 0 where idx is -1."""
    _check(q, kv, idx)
    (rows, heads, width), k = q.shape, idx.shape[1]
    config = config or _target_config(q)
    value_dim = 1 << ((width - 1).bit_length() - 1)  # any cut will do for logits: the largest power of two below width
    p = torch.empty(rows, k, dtype=torch.float32, device=q.device)
    if rows:
        _target[(rows,)](
            q, kv, idx, lse, p, scale, heads, value_dim, width - value_dim, k, config.heads, config.keys,
            _power(value_dim), _power(width - value_dim), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return p


def backward(
    q: Tensor,
    kv: Tensor,
    idx: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    scale: float,
    d_kv: Tensor,
    deterministic: bool = False,
    config: BackwardConfig | None = None,
    workspace: int = 1 << 30,
) -> Tensor:
    """Gradients of `forward`: returns d_q [R, H, C+r] in q's dtype and adds to d_kv fp32 [S, C+r] in place.

    `workspace` bounds the bytes of P and dS (and of the rows of dkv, in deterministic mode) that exist at a time; rows
    are worked off in sub-chunks of that size. Deterministic mode repeats bit for bit, fast mode up to the order of
    additions into d_kv (d_q is always the same).
    """
    _check(q, kv, idx)
    assert out.is_contiguous() and lse.is_contiguous() and d_kv.is_contiguous() and d_kv.dtype == torch.float32
    d_out = d_out.contiguous()
    (rows, heads, width), k, value_dim = q.shape, idx.shape[1], out.shape[2]
    config = config or _backward_config(q)
    scores, gradients = config.scores, config.gradients
    unit = max(scores.keys, gradients.keys)
    padded = triton.cdiv(k, unit) * unit
    row_bytes = 2 * heads * padded * q.element_size() + (4 * k * width if deterministic else 0)
    step = max(1, min(rows, workspace // row_bytes))
    p = torch.empty(step, heads, padded, dtype=q.dtype, device=q.device)
    ds = torch.empty_like(p)
    buffer = torch.empty(step, k, width, dtype=torch.float32, device=q.device) if deterministic else d_kv
    d_q = torch.empty_like(q)
    sizes = (heads, value_dim, width - value_dim, k, padded, unit)
    row_power = triton.next_power_of_2(k)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        q_b, idx_b, d_out_b, count = q[part], idx[part], d_out[part], part.stop - start
        _backward_scores[(count * triton.cdiv(heads, scores.heads),)](
            q_b, kv, idx_b, out[part], lse[part], d_out_b, p, ds, scale, *sizes, scores.heads, scores.keys,
            _power(value_dim), _power(width - value_dim), row_power,
            num_warps=scores.num_warps, num_stages=scores.num_stages,
        )  # fmt: skip
        # More heads than fit a contraction: block after block, so that deterministic mode adds them in this order.
        for head_start in range(0, heads, gradients.heads):
            for columns, is_value in ((value_dim, True), (width - value_dim, False)):
                block = _power(columns, config.columns)
                _backward_gradients[(count * triton.cdiv(columns, block),)](
                    q_b, kv, idx_b, d_out_b, p, ds, d_q[part], buffer, head_start, *sizes, gradients.heads,
                    gradients.keys, block, is_value, not deterministic, row_power,
                    num_warps=gradients.num_warps, num_stages=gradients.num_stages,
                )  # fmt: skip
            if deterministic:
                segment_sum(buffer[:count].view(count * k, width), idx_b.reshape(-1), d_kv)
    return d_q
