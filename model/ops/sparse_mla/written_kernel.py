"""sparse_mla with a row's P written out, 2 H k bytes: the forward pass where the target is asked for, and the backward.

`kernel.py`'s forward holds [64 heads, 512 columns] of output in registers and makes its scores between two products
that wait for each other, and its target makes the same scores once more. Here every kernel is one matrix product of all
heads at a time (measured on an H100 at V3.2's sizes: README.md):

    products   S or dP [heads, keys] over the row's width; P, or dS from P       stationary: q or dO
    weighted   out or dq [heads, columns] over the keys; P's mean on the side
    columns    dkv [columns, keys] over the heads                                stationary: q^T and dO^T

The forward's P has a factor of its own a tile, by the largest logit so far, which the second kernel takes out. A
stationary left operand of 128 heads fills shared memory and leaves a gathered tile of 32 keys, at which the tensor
cores wait for shared memory. A product with the identity puts it into registers: Triton has no other way to say so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops.scatter_kernel import segment_sum
from model.ops.sparse_mla.kernel import LN_2, LOG2_E, _check, _last_entry

ONLINE, GIVEN, GRADIENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@dataclass(frozen=True)
class Config:
    """Keys of a tile and columns of a program (powers of two from 16), and how many quarters of the stationary operand
    leave shared memory for registers; `query_`: dq, `key_`: dkv."""

    keys: int = 64
    registers: int = 3
    columns: int = 256
    query_columns: int = 128
    key_columns: int = 256
    key_registers: int = 1
    num_warps: int = 8
    num_stages: int = 3


def suits(q: Tensor, kv: Tensor, value_dim: int) -> bool:
    """Whether these kernels take q [R, H, C+r], kv [S, C+r] with C = value_dim and are the faster ones: 16-bit numbers,
    heads in one tile, no size that needs a mask, offsets of kv in 32 bits."""
    heads, rope = q.shape[1], q.shape[2] - value_dim
    powers = all(size & (size - 1) == 0 for size in (heads, value_dim, rope))
    fits = 16 <= heads <= 128 and value_dim >= 64 and 16 <= rope <= 128
    return q.element_size() == 2 and powers and fits and kv.numel() < 1 << 31


@triton.jit
def _entries(idx, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K entries of a row of `idx`, -1 behind its end."""
    slot = start + tl.arange(0, BLOCK_K)
    if K % BLOCK_K == 0:
        key = tl.load(idx + slot)
    else:
        key = tl.load(idx + slot, mask=slot < K, other=-1)
    return key


@triton.jit
def _gather(kv, key, column, WIDTH: tl.constexpr):
    """[keys, columns] of kv, 0 where key is -1; a tile's offsets are 32 bits wide to save registers."""
    mask = (key >= 0)[:, None] & (column >= 0)[None, :]
    return tl.load(kv + (key * WIDTH)[:, None] + column[None, :], mask=mask, other=0.0)


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
def _products(
    left, kv, idx, p, ds, top_out, lse, out, scale,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr, PADDED_K: tl.constexpr,
    BLOCK_K: tl.constexpr, ROW: tl.constexpr, MODE: tl.constexpr, REGISTERS: tl.constexpr,
):  # fmt: skip
    """One query row, up to its last entry (rounded up to a tile), in memory [H, PADDED_K].

    ONLINE: P up to a factor a tile, the factor's logarithm (base 2) and lse (nats), from left = q. GIVEN: P from lse.
    GRADIENT: dS = scale P (dO v - delta) from P and left = dO.
    """
    PART: tl.constexpr = C // 4
    LEFT: tl.constexpr = C if MODE == GRADIENT else C + R
    WIDTH: tl.constexpr = C + R
    TILES: tl.constexpr = PADDED_K // BLOCK_K
    t = tl.program_id(0).to(tl.int64)
    h, c = tl.arange(0, H), tl.arange(0, PART)
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
        x4 = tl.load(left + C + rows[:, None] + r[None, :])
    if MODE == GIVEN:
        log_sum = tl.load(lse + t * H + h) * LOG2_E
    top = tl.full([H], -float("inf"), tl.float32)
    total = tl.zeros([H], tl.float32)
    idx += t * K
    stop = _last_entry(idx, K, ROW)
    place = t * H * PADDED_K + h[:, None] * PADDED_K + tl.arange(0, BLOCK_K)[None, :]
    for start in range(0, stop, BLOCK_K):
        key = _entries(idx, start, K, BLOCK_K)
        s = tl.dot(x0, tl.trans(_gather(kv, key, c, WIDTH)), input_precision="ieee")
        s = tl.dot(x1, tl.trans(_gather(kv + PART, key, c, WIDTH)), s, input_precision="ieee")
        s = tl.dot(x2, tl.trans(_gather(kv + 2 * PART, key, c, WIDTH)), s, input_precision="ieee")
        s = tl.dot(x3, tl.trans(_gather(kv + 3 * PART, key, c, WIDTH)), s, input_precision="ieee")
        if MODE != GRADIENT:
            s = tl.dot(x4, tl.trans(_gather(kv + C, key, r, WIDTH)), s, input_precision="ieee")
            s = tl.where((key >= 0)[None, :], s * (scale * LOG2_E), -float("inf"))
        if MODE == ONLINE:
            new_top = tl.maximum(top, tl.max(s, axis=1))
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing so far: exp2(-inf), not exp2(nan)
            probability = tl.exp2(s - shift[:, None])
            total = total * tl.exp2(top - shift) + tl.sum(probability, axis=1)
            top = new_top
            tl.store(p + place + start, probability.to(p.dtype.element_ty))
            tl.store(top_out + (t * TILES + start // BLOCK_K) * H + h, top)
        elif MODE == GIVEN:
            tl.store(p + place + start, tl.exp2(s - log_sum[:, None]).to(p.dtype.element_ty))
        else:
            probability = tl.load(p + place + start).to(tl.float32)
            tl.store(ds + place + start, (probability * (s - delta[:, None]) * scale).to(ds.dtype.element_ty))
    if MODE == ONLINE:
        total = tl.where(total == 0.0, 1.0, total)
        tl.store(lse + t * H + h, (top + tl.log2(total)) * LN_2)


@triton.jit
def _weighted(
    kv, idx, p, top, lse, out, mean,
    H: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, PADDED_K: tl.constexpr, COLUMNS: tl.constexpr,
    OUT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, ROW: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """out[h, columns] = sum_j p[h, j] kv[idx[j], columns]. SCALED: p is the forward's; its tiles are brought to one
    factor, and the first columns' program writes the mean over heads as well."""
    BLOCKS: tl.constexpr = COLUMNS // BLOCK_C
    TILES: tl.constexpr = PADDED_K // BLOCK_K
    t, part = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    column, h, slot = part * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, H), tl.arange(0, BLOCK_K)
    idx += t * K
    stop = _last_entry(idx, K, ROW)
    place = t * H * PADDED_K + h[:, None] * PADDED_K + slot[None, :]
    if SCALED:
        log_sum = tl.load(lse + t * H + h) * LOG2_E
    acc = tl.zeros([H, BLOCK_C], tl.float32)
    for start in range(0, stop, BLOCK_K):
        rows = _gather(kv, _entries(idx, start, K, BLOCK_K), column, WIDTH)
        weight = tl.load(p + place + start)
        if SCALED:
            factor = tl.exp2(tl.load(top + (t * TILES + start // BLOCK_K) * H + h) - log_sum)
            wide = weight.to(tl.float32) * factor[:, None]
            if part == 0:
                tl.store(mean + t * K + start + slot, tl.sum(wide, axis=0) * (1.0 / H), mask=start + slot < K)
            weight = wide.to(rows.dtype)
        acc = tl.dot(weight, rows, acc, input_precision="ieee")
    if SCALED:
        if part == 0:
            behind = tl.arange(0, ROW)
            written = tl.cdiv(stop, BLOCK_K) * BLOCK_K
            tl.store(mean + t * K + behind, 0.0 * behind, mask=(behind >= written) & (behind < K))
    tl.store(out + (t * H + h)[:, None] * OUT + column[None, :], acc.to(out.dtype.element_ty))


@triton.jit
def _columns(
    q, idx, d_out, p, ds, d_kv,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr, PADDED_K: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, ROW: tl.constexpr, VALUE: tl.constexpr, REGISTERS: tl.constexpr,
    ATOMIC: tl.constexpr,
):  # fmt: skip
    """dkv[idx[j]] += dS^T q + P^T dO for BLOCK_D columns of the latent (VALUE), or of the rope behind it: dS^T q.

    ATOMIC adds to d_kv [S, C+R]; otherwise d_kv is a buffer [rows, K, C+R] of which each real entry is written.
    """
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
    place = t * H * PADDED_K + h[:, None] * PADDED_K + slot[None, :]
    for start in range(0, stop, BLOCK_K):
        key = _entries(idx, start, K, BLOCK_K)
        rows = tl.dot(left, tl.load(ds + place + start), input_precision="ieee")
        if VALUE:
            rows = tl.dot(upstream, tl.load(p + place + start), rows, input_precision="ieee")
        rows = tl.trans(rows)
        mask = (key >= 0)[:, None] & (column >= 0)[None, :]
        if ATOMIC:
            tl.atomic_add(d_kv + (key * (C + R))[:, None] + column[None, :], rows, mask=mask, sem="relaxed")
        else:
            tl.store(d_kv + (t * K + start + slot)[:, None] * (C + R) + column[None, :], rows, mask=mask)


class _Launch:
    """Sizes and configuration that all kernels of a call share; tensors are those of a chunk of rows."""

    def __init__(self, q: Tensor, kv: Tensor, idx: Tensor, value_dim: int, scale: float, config: Config) -> None:
        _check(q, kv, idx)
        (_, self.heads, self.width), self.k = q.shape, idx.shape[1]
        self.latent, self.rope = value_dim, self.width - value_dim
        self.kv, self.scale, self.config = kv, scale, config
        self.padded = triton.cdiv(self.k, config.keys) * config.keys
        self.tiles = self.padded // config.keys
        self.row = triton.next_power_of_2(self.k)
        self.p_bytes = self.heads * self.padded * q.element_size()  # of a row

    def products(
        self, mode: int, left: Tensor, idx: Tensor, p: Tensor, ds: Tensor, top: Tensor, lse: Tensor, out: Tensor
    ) -> None:
        c = self.config
        _products[(len(idx),)](
            left, self.kv, idx, p, ds, top, lse, out, self.scale, self.heads, self.latent, self.rope, self.k,
            self.padded, c.keys, self.row, mode, c.registers, num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip

    def values(self, idx: Tensor, p: Tensor, top: Tensor, lse: Tensor, out: Tensor, mean: Tensor) -> None:
        self._weighted(idx, p, top, lse, out, mean, 0, self.latent, self.config.columns, True)

    def query_gradients(self, idx: Tensor, ds: Tensor, d_q: Tensor) -> None:
        for first, columns in ((0, self.latent), (self.latent, self.rope)):
            self._weighted(idx, ds, ds, ds, d_q, ds, first, columns, self.config.query_columns, False)

    def _weighted(self, idx, p, top, lse, out, mean, first: int, columns: int, block: int, scaled: bool) -> None:
        c, block = self.config, min(block, columns)
        _weighted[(len(idx) * (columns // block),)](
            self.kv[:, first:], idx, p, top, lse, out[..., first:], mean, self.heads, self.width, self.k, self.padded,
            columns, out.shape[2], c.keys, block, self.row, scaled,
            num_warps=c.num_warps if block > 64 else 4, num_stages=c.num_stages,
        )  # fmt: skip

    def key_gradients(
        self, q: Tensor, idx: Tensor, d_out: Tensor, p: Tensor, ds: Tensor, d_kv: Tensor, atomic: bool
    ) -> None:
        c = self.config
        for columns, is_value in ((self.latent, True), (self.rope, False)):
            block = min(c.key_columns, columns)
            _columns[(len(idx) * (columns // block),)](
                q, idx, d_out, p, ds, d_kv, self.heads, self.latent, self.rope, self.k, self.padded, c.keys, block,
                self.row, is_value, c.key_registers, atomic,
                num_warps=c.num_warps if block > 64 else 4, num_stages=c.num_stages,
            )  # fmt: skip


def forward(
    q: Tensor,
    kv: Tensor,
    idx: Tensor,
    scale: float,
    value_dim: int,
    config: Config = Config(),
    workspace: int = 1 << 30,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernel.forward` and `kernel.target` in one: out [R, H, C], lse fp32 [R, H] and the mean over heads of the
    probabilities, fp32 [R, k], 0 where idx is -1. P is rounded to q's dtype before the mean, too.

    `workspace` bounds the bytes of P that exist at a time: rows are worked off in sub-chunks. `into`: contiguous
    tensors that take the results.
    """
    launch, (rows, heads, _) = _Launch(q, kv, idx, value_dim, scale, config), q.shape
    out, lse, mean = into or (
        torch.empty(rows, heads, value_dim, dtype=q.dtype, device=q.device),
        torch.empty(rows, heads, dtype=torch.float32, device=q.device),
        torch.empty(rows, launch.k, dtype=torch.float32, device=q.device),
    )
    assert out.is_contiguous() and lse.is_contiguous() and mean.is_contiguous()
    step = max(1, min(rows, workspace // (launch.p_bytes + 4 * heads * launch.tiles)))
    p = torch.empty(step, heads, launch.padded, dtype=q.dtype, device=q.device)
    top = torch.empty(step, launch.tiles, heads, dtype=torch.float32, device=q.device)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        launch.products(0, q[part], idx[part], p, p, top, lse[part], p)
        launch.values(idx[part], p, top, lse[part], out[part], mean[part])
    return out, lse, mean


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
    config: Config = Config(),
    workspace: int = 1 << 30,
) -> Tensor:
    """As `kernel.backward`: returns d_q and adds to d_kv, `workspace` bytes of P, dS and rows of dkv at a time."""
    assert out.is_contiguous() and lse.is_contiguous() and d_kv.is_contiguous() and d_kv.dtype == torch.float32
    launch, (rows, heads, width) = _Launch(q, kv, idx, out.shape[2], scale, config), q.shape
    d_out = d_out.contiguous()
    row_bytes = 2 * launch.p_bytes + (4 * launch.k * width if deterministic else 0)
    step = max(1, min(rows, workspace // row_bytes))
    p = torch.empty(step, heads, launch.padded, dtype=q.dtype, device=q.device)
    ds = torch.empty_like(p)
    buffer = torch.empty(step, launch.k, width, dtype=torch.float32, device=q.device) if deterministic else d_kv
    d_q = torch.empty_like(q)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        q_b, idx_b, d_out_b = q[part], idx[part], d_out[part]
        launch.products(1, q_b, idx_b, p, p, p, lse[part], p)
        launch.products(2, d_out_b, idx_b, p, ds, p, p, out[part])
        launch.query_gradients(idx_b, ds, d_q[part])
        launch.key_gradients(q_b, idx_b, d_out_b, p, ds, buffer, not deterministic)
        if deterministic:
            segment_sum(buffer[: len(idx_b)].view(-1, width), idx_b.reshape(-1), d_kv)
    return d_q
