"""Other ways through sparse_mla, for bench/gpu_sweep.py to time: nothing else uses them.

The forward kernel holds [64 heads, 512 columns] of output in registers and makes its scores between two products that
wait for each other; the target makes the same scores once more. Here a row's P is written, 2 H k bytes, as it is in the
backward pass, and every kernel is one product of all 128 heads at full width:

    products   S or dP [heads, keys] over the row's width; P, or dS from P       stationary: q or dO
    weighted   out or dq [heads, columns] over the keys; P's mean on the side
    columns    dkv [columns, keys] over the heads                                stationary: q^T and dO^T

A stationary left operand of 128 heads fills shared memory and leaves a gathered tile of 32 keys, at which the tensor
cores wait for shared memory. A product with the identity puts it into registers: Triton has no other way to say so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops.sparse_mla.kernel import LN_2, LOG2_E, _last_entry

ONLINE, GIVEN, GRADIENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _gather(kv, key, column, WIDTH: tl.constexpr):
    """[keys, columns] of kv; a tile's offsets are 32 bits wide to save registers."""
    return tl.load(kv + (key * WIDTH)[:, None] + column[None, :], mask=(key >= 0)[:, None] & (column >= 0)[None, :],
                   other=0.0)  # fmt: skip


@triton.jit
def _stationary(left, eye, rows, column, IN_REGISTERS: tl.constexpr):
    x = tl.load(left + rows[:, None] + column[None, :])
    if IN_REGISTERS:
        x = tl.dot(eye, x, input_precision="ieee").to(x.dtype)
    return x


@triton.jit
def _delta(out, d_out, rows, column):
    place = rows[:, None] + column[None, :]
    return tl.sum(tl.load(out + place).to(tl.float32) * tl.load(d_out + place).to(tl.float32), axis=1)


@triton.jit
def products_kernel(
    left, kv, idx, p, ds, top_out, lse, out, scale,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, ROW: tl.constexpr,
    MODE: tl.constexpr, REGISTERS: tl.constexpr,
):  # fmt: skip
    """ONLINE: P up to a factor a tile, and lse (base 2). GIVEN: P from lse (nats). GRADIENT: dS from P and dO.

    REGISTERS: how many of the left operand's four chunks, and its rope columns as a fifth, leave shared memory.
    """
    PART: tl.constexpr = C // 4
    LEFT: tl.constexpr = C if MODE == GRADIENT else C + R
    WIDTH: tl.constexpr = C + R
    t = tl.program_id(0).to(tl.int64)
    h, slot, c = tl.arange(0, H), tl.arange(0, BLOCK_K), tl.arange(0, PART)
    eye = tl.where(h[:, None] == h[None, :], 1.0, 0.0).to(left.dtype.element_ty)
    left += t * H * LEFT
    rows = h * LEFT
    if MODE == GRADIENT:
        out += t * H * C
        delta = _delta(out, left, rows, c) + _delta(out + PART, left + PART, rows, c)
        delta += _delta(out + 2 * PART, left + 2 * PART, rows, c) + _delta(out + 3 * PART, left + 3 * PART, rows, c)
    x0 = _stationary(left, eye, rows, c, REGISTERS > 0)
    x1 = _stationary(left + PART, eye, rows, c, REGISTERS > 1)
    x2 = _stationary(left + 2 * PART, eye, rows, c, REGISTERS > 2)
    x3 = _stationary(left + 3 * PART, eye, rows, c, REGISTERS > 3)
    if MODE != GRADIENT:
        r = tl.arange(0, R)
        x4 = _stationary(left + C, eye, rows, r, REGISTERS > 4)
    if MODE == GIVEN:
        log_sum = tl.load(lse + t * H + h) * LOG2_E
    top = tl.full([H], -float("inf"), tl.float32)
    total = tl.zeros([H], tl.float32)
    idx += t * K
    stop = _last_entry(idx, K, ROW)
    place = t * H * K + h[:, None] * K + slot[None, :]
    for start in range(0, stop, BLOCK_K):
        key = tl.load(idx + start + slot)
        s = tl.dot(x0, tl.trans(_gather(kv, key, c, WIDTH)), input_precision="ieee")
        s = tl.dot(x1, tl.trans(_gather(kv + PART, key, c, WIDTH)), s, input_precision="ieee")
        s = tl.dot(x2, tl.trans(_gather(kv + 2 * PART, key, c, WIDTH)), s, input_precision="ieee")
        s = tl.dot(x3, tl.trans(_gather(kv + 3 * PART, key, c, WIDTH)), s, input_precision="ieee")
        if MODE != GRADIENT:
            s = tl.dot(x4, tl.trans(_gather(kv + C, key, r, WIDTH)), s, input_precision="ieee")
            s = tl.where((key >= 0)[None, :], s * (scale * LOG2_E), -float("inf"))
        if MODE == ONLINE:
            new_top = tl.maximum(top, tl.max(s, axis=1))
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)
            probability = tl.exp2(s - shift[:, None])
            total = total * tl.exp2(top - shift) + tl.sum(probability, axis=1)
            top = new_top
            tl.store(p + place + start, probability.to(p.dtype.element_ty))
            tl.store(top_out + (t * (K // BLOCK_K) + start // BLOCK_K) * H + h, shift)
        elif MODE == GIVEN:
            tl.store(p + place + start, tl.exp2(s - log_sum[:, None]).to(p.dtype.element_ty))
        else:
            probability = tl.load(p + place + start).to(tl.float32)
            tl.store(ds + place + start, (probability * (s - delta[:, None]) * scale).to(ds.dtype.element_ty))
    if MODE == ONLINE:
        total = tl.where(total == 0.0, 1.0, total)
        tl.store(lse + t * H + h, (top + tl.log2(total)) * LN_2)


@triton.jit
def weighted_kernel(
    kv, idx, p, top, lse, out, mean,
    H: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, OUT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, ROW: tl.constexpr, SCALED: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """out[h, columns] = sum_j p[h, j] kv[idx[j], columns]; SCALED brings P's tiles to one factor, TARGET means it."""
    BLOCKS: tl.constexpr = COLUMNS // BLOCK_C
    t, part = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    column, h, slot = part * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, H), tl.arange(0, BLOCK_K)
    idx += t * K
    stop = _last_entry(idx, K, ROW)
    place = t * H * K + h[:, None] * K + slot[None, :]
    if SCALED:
        log_sum = tl.load(lse + t * H + h) * LOG2_E
        log_sum = tl.where(log_sum == -float("inf"), 0.0, log_sum)
    acc = tl.zeros([H, BLOCK_C], tl.float32)
    for start in range(0, stop, BLOCK_K):
        rows = _gather(kv, tl.load(idx + start + slot), column, WIDTH)
        weight = tl.load(p + place + start)
        if SCALED:
            factor = tl.exp2(tl.load(top + (t * (K // BLOCK_K) + start // BLOCK_K) * H + h) - log_sum)
            wide = weight.to(tl.float32) * factor[:, None]
            if TARGET:
                if part == 0:
                    tl.store(mean + t * K + start + slot, tl.sum(wide, axis=0) * (1.0 / H))
            weight = wide.to(rows.dtype)
        acc = tl.dot(weight, rows, acc, input_precision="ieee")
    if TARGET:
        if part == 0:
            behind = tl.arange(0, ROW)
            tl.store(
                mean + t * K + behind, 0.0 * behind, mask=(behind >= tl.cdiv(stop, BLOCK_K) * BLOCK_K) & (behind < K)
            )
    tl.store(out + (t * H + h)[:, None] * OUT + column[None, :], acc.to(out.dtype.element_ty))


@triton.jit
def columns_kernel(
    q, idx, d_out, p, ds, d_kv,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    ROW: tl.constexpr, VALUE: tl.constexpr, REGISTERS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """dkv[idx[j]] += dS^T q + P^T dO for BLOCK_D columns. Without ADD nothing is added: what the atomics cost."""
    COLUMNS: tl.constexpr = C if VALUE else R
    BLOCKS: tl.constexpr = COLUMNS // BLOCK_D
    t, first = (tl.program_id(0) // BLOCKS).to(tl.int64), (tl.program_id(0) % BLOCKS) * BLOCK_D
    column, h, slot = first + tl.arange(0, BLOCK_D), tl.arange(0, H), tl.arange(0, BLOCK_K)
    eye = tl.where(h[:, None] == h[None, :], 1.0, 0.0).to(q.dtype.element_ty)
    if not VALUE:
        q, d_kv = q + C, d_kv + C
    left = tl.load(q + t * H * (C + R) + h[None, :] * (C + R) + column[:, None])
    if REGISTERS > 0:
        left = tl.dot(left, eye, input_precision="ieee").to(left.dtype)
    if VALUE:
        upstream = tl.load(d_out + t * H * C + h[None, :] * C + column[:, None])
        if REGISTERS > 1:
            upstream = tl.dot(upstream, eye, input_precision="ieee").to(upstream.dtype)
    idx += t * K
    stop = _last_entry(idx, K, ROW)
    place = t * H * K + h[:, None] * K + slot[None, :]
    for start in range(0, stop, BLOCK_K):
        key = tl.load(idx + start + slot)
        rows = tl.dot(left, tl.load(ds + place + start), input_precision="ieee")
        if VALUE:
            rows = tl.dot(upstream, tl.load(p + place + start), rows, input_precision="ieee")
        rows = tl.trans(rows)
        target = d_kv + (key * (C + R))[:, None] + column[None, :]
        mask = (key >= 0)[:, None] & (column >= 0)[None, :]
        if not ADD:
            mask &= rows == 12345.0
        tl.atomic_add(target, rows, mask=mask, sem="relaxed")


def power(size: int) -> int:
    return triton.next_power_of_2(size)


def scores(
    q: Tensor, kv: Tensor, idx: Tensor, scale: float, c: int, keys: int, registers: int, warps: int, stages: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> P up to a factor a tile [R, H, K], the factors' logarithms [R, K / keys, H], lse [R, H] in nats."""
    (rows, heads, width), k = q.shape, idx.shape[1]
    p = torch.empty(rows, heads, k, dtype=q.dtype, device=q.device)
    top = torch.empty(rows, k // keys, heads, device=q.device)
    lse = torch.empty(rows, heads, device=q.device)
    products_kernel[(rows,)](
        q, kv, idx, p, p, top, lse, p, scale, heads, c, width - c, k, keys, power(k), 0, registers,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return p, top, lse


def probabilities(
    q: Tensor, kv: Tensor, idx: Tensor, lse: Tensor, scale: float, c: int, keys: int, registers: int, warps: int,
    stages: int,
) -> Tensor:  # fmt: skip
    """P [R, H, K] from lse."""
    (rows, heads, width), k = q.shape, idx.shape[1]
    p = torch.empty(rows, heads, k, dtype=q.dtype, device=q.device)
    products_kernel[(rows,)](
        q, kv, idx, p, p, lse, lse, p, scale, heads, c, width - c, k, keys, power(k), 1, registers,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return p


def score_gradients(
    d_out: Tensor, kv: Tensor, idx: Tensor, p: Tensor, out: Tensor, scale: float, keys: int, registers: int, warps: int,
    stages: int,
) -> Tensor:  # fmt: skip
    """dS [R, H, K] from P."""
    (rows, heads, c), k = d_out.shape, idx.shape[1]
    ds = torch.empty_like(p)
    products_kernel[(rows,)](
        d_out, kv, idx, p, ds, p, p, out, scale, heads, c, kv.shape[1] - c, k, keys, power(k), 2, registers,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return ds


def values(
    kv: Tensor, idx: Tensor, p: Tensor, top: Tensor, lse: Tensor, c: int, target: bool, block: int, warps: int,
    stages: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> out [R, H, c] and, on request, the head mean of P [R, K]."""
    rows, heads, k = p.shape
    keys = k // top.shape[1]
    out = torch.empty(rows, heads, c, dtype=kv.dtype, device=kv.device)
    mean = torch.empty(rows, k, device=kv.device)
    weighted_kernel[(rows * (c // block),)](
        kv, idx, p, top, lse, out, mean, heads, kv.shape[1], k, c, c, keys, block, power(k), True, target,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, mean


def query_gradients(
    kv: Tensor, idx: Tensor, ds: Tensor, c: int, keys: int, block: int, warps: int, stages: int
) -> Tensor:
    """-> d q [R, H, C + R]."""
    (rows, heads, k), width = ds.shape, kv.shape[1]
    d_q = torch.empty(rows, heads, width, dtype=kv.dtype, device=kv.device)
    for first, columns, cut in ((0, c, block), (c, width - c, width - c)):
        weighted_kernel[(rows * (columns // cut),)](
            kv[:, first:], idx, ds, ds, ds, d_q[..., first:], ds, heads, width, k, columns, width, keys, cut, power(k),
            False, False, num_warps=warps if cut > 64 else 4, num_stages=stages,
        )  # fmt: skip
    return d_q


def key_gradients(
    q: Tensor, idx: Tensor, d_out: Tensor, p: Tensor, ds: Tensor, d_kv: Tensor, keys: int, block: int, registers: int,
    warps: int, stages: int, add: bool = True,
) -> None:  # fmt: skip
    """Adds to d_kv fp32 [S, C + R]."""
    (rows, heads, k), c, width = ds.shape, d_out.shape[2], q.shape[2]
    for columns, cut, is_value in ((c, block, True), (width - c, width - c, False)):
        columns_kernel[(rows * (columns // cut),)](
            q, idx, d_out, p, ds, d_kv, heads, c, width - c, k, keys, cut, power(k), is_value, registers, add,
            num_warps=warps if cut > 64 else 4, num_stages=stages,
        )  # fmt: skip
