"""The indexer's scores over selected keys and their gradient as Triton kernels (DeepSeek-V3.2, eq. 1 and 4; README.md).

    I[t, j] = sum_h w[t, h] relu(q[t, h] . k[idx[t, j]])

A program is one query row: it gathers a tile of index keys once and all heads of the indexer are the rows of its matrix
products. The softmax and the KL between the two passes are a few operations on [R, k] and stay in torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops.scatter_kernel import segment_sum


@dataclass(frozen=True)
class Config:
    """Keys of a tile (a power of two from 16), and how Triton compiles the kernel."""

    keys: int
    num_warps: int
    num_stages: int


def _scores_config(q_index: Tensor) -> Config:
    return Config(64, 4, 2) if q_index.element_size() == 2 else Config(16, 4, 1)


def _backward_config(q_index: Tensor) -> Config:
    return Config(64, 4, 3) if q_index.element_size() == 2 else Config(16, 4, 1)


def _power(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


@triton.jit
def _scores(
    q, k, w, idx, scores,
    H: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h, d, slot = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    head_mask = (h < H)[:, None] & (d < D)[None, :]
    q_t = tl.load(q + (t * H + h)[:, None] * D + d[None, :], mask=head_mask, other=0.0)
    w_t = tl.load(w + t * H + h, mask=h < H, other=0.0).to(tl.float32)
    for start in range(0, K, BLOCK_K):
        key = tl.load(idx + t * K + start + slot, mask=start + slot < K, other=-1)
        key_mask = (key >= 0)[:, None] & (d < D)[None, :]
        k_t = tl.load(k + key.to(tl.int64)[:, None] * D + d[None, :], mask=key_mask, other=0.0)
        products = tl.maximum(tl.dot(q_t, tl.trans(k_t), input_precision="ieee"), 0.0)
        total = tl.where(key >= 0, tl.sum(products * w_t[:, None], axis=0), -float("inf"))
        tl.store(scores + t * K + start + slot, total, mask=start + slot < K)


@triton.jit
def _backward(
    q, k, w, idx, d_scores, d_q, d_k, d_w,
    H: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """With g = d_scores: d_w = sum_j g relu(s), and through ds = w g [s > 0]: d_q = ds k, d_k[idx] += ds^T q.

    ATOMIC adds to d_k [S, D]; otherwise d_k is a buffer [rows, K, D] of which each real entry is written.
    """
    t = tl.program_id(0).to(tl.int64)
    h, d, slot = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    head_mask = (h < H)[:, None] & (d < D)[None, :]
    q_t = tl.load(q + (t * H + h)[:, None] * D + d[None, :], mask=head_mask, other=0.0)
    w_t = tl.load(w + t * H + h, mask=h < H, other=0.0).to(tl.float32)
    acc_q = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    acc_w = tl.zeros([BLOCK_H], tl.float32)
    for start in range(0, K, BLOCK_K):
        key = tl.load(idx + t * K + start + slot, mask=start + slot < K, other=-1)
        g = tl.load(d_scores + t * K + start + slot, mask=key >= 0, other=0.0)
        key_mask = (key >= 0)[:, None] & (d < D)[None, :]
        k_t = tl.load(k + key.to(tl.int64)[:, None] * D + d[None, :], mask=key_mask, other=0.0)
        s = tl.dot(q_t, tl.trans(k_t), input_precision="ieee")
        acc_w += tl.sum(tl.maximum(s, 0.0) * g[None, :], axis=1)
        ds = tl.where(s > 0.0, w_t[:, None] * g[None, :], 0.0).to(k_t.dtype)
        acc_q = tl.dot(ds, k_t, acc_q, input_precision="ieee")
        d_rows = tl.dot(tl.trans(ds), q_t, input_precision="ieee")
        if ATOMIC:
            target = d_k + key.to(tl.int64)[:, None] * D + d[None, :]
            tl.atomic_add(target, d_rows, mask=key_mask, sem="relaxed")
        else:
            target = d_k + (t * K + start + slot)[:, None] * D + d[None, :]
            tl.store(target, d_rows, mask=key_mask)
    tl.store(d_q + (t * H + h)[:, None] * D + d[None, :], acc_q, mask=head_mask)
    tl.store(d_w + t * H + h, acc_w, mask=h < H)


def _check(q_index: Tensor, k_index: Tensor, w: Tensor, idx: Tensor) -> None:
    assert all(tensor.is_contiguous() for tensor in (q_index, k_index, w, idx)) and idx.dtype == torch.int32
    assert q_index.dtype == k_index.dtype and q_index.shape[2] == k_index.shape[1] and w.shape == q_index.shape[:2]


def scores(q_index: Tensor, k_index: Tensor, w: Tensor, idx: Tensor, config: Config | None = None) -> Tensor:
    """q_index [R, Hi, di], k_index [S, di], w [R, Hi], idx int32 [R, k] -> I fp32 [R, k], -inf where idx is -1."""
    _check(q_index, k_index, w, idx)
    (rows, heads, width), k = q_index.shape, idx.shape[1]
    config = config or _scores_config(q_index)
    result = torch.empty(rows, k, dtype=torch.float32, device=q_index.device)
    if rows:
        _scores[(rows,)](
            q_index, k_index, w, idx, result, heads, width, k, _power(heads), config.keys, _power(width),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return result


def backward(
    q_index: Tensor,
    k_index: Tensor,
    w: Tensor,
    idx: Tensor,
    d_scores: Tensor,
    d_k: Tensor,
    deterministic: bool = False,
    config: Config | None = None,
    workspace: int = 1 << 30,
) -> tuple[Tensor, Tensor]:
    """Gradients of `scores`: returns d_q fp32 [R, Hi, di] and d_w fp32 [R, Hi], adds to d_k fp32 [S, di] in place.

    d_scores fp32 [R, k] is not read where idx is -1. relu'(0) = 0. Fast mode adds to d_k by atomics; deterministic mode
    writes `workspace` bytes of gradient rows at a time and adds those up in a fixed order.
    """
    _check(q_index, k_index, w, idx)
    assert d_scores.is_contiguous() and d_k.is_contiguous() and d_k.dtype == d_scores.dtype == torch.float32
    (rows, heads, width), k = q_index.shape, idx.shape[1]
    config = config or _backward_config(q_index)
    d_q = torch.empty(rows, heads, width, dtype=torch.float32, device=q_index.device)
    d_w = torch.empty(rows, heads, dtype=torch.float32, device=q_index.device)
    step, target = rows, d_k
    if deterministic:
        step = max(1, min(rows, workspace // (4 * k * width)))
        target = torch.empty(step, k, width, dtype=torch.float32, device=q_index.device)
    for start in range(0, rows, max(1, step)):
        part = slice(start, min(start + step, rows))
        _backward[(part.stop - start,)](
            q_index[part], k_index, w[part], idx[part], d_scores[part], d_q[part], target, d_w[part],
            heads, width, k, _power(heads), config.keys, _power(width), not deterministic,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if deterministic:
            segment_sum(target[: part.stop - start].view(-1, width), idx[part].reshape(-1), d_k)
    return d_q, d_w
