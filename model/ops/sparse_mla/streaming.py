"""Absorbed (multi-query) attention over the selected latents, forward and backward (DeepSeek-V3.2, eq. 2; MLA absorbed
form).

    s[t, h, j] = scale * q[t, h] . kv[idx[t, j]]      out[t, h] = sum_j softmax_j(s)[t, h, j] * kv[idx[t, j],
    :value_dim]

Every head reads the same rows, so a selected token costs one row whatever the number of heads. Gathered rows and
probabilities live for one block of queries; backward gathers and scores again instead of saving them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model.ops.common import compute_dtype, no_autocast

GATHER_BYTES = 4 << 20  # gathered rows of a block: near the size of a second-level cache is fastest on CPU


def selection_blocks(idx: Tensor, floats_per_key: int, block: int | None = None) -> Iterator[tuple[int, int]]:
    """Row ranges whose gathered rows (rows x k x `floats_per_key` fp32) fit GATHER_BYTES."""
    rows, k = idx.shape
    step = block or max(1, GATHER_BYTES // (4 * k * floats_per_key))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def gather_rows(kv: Tensor, idx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(kv rows [rows, k, D], mask [rows, k] of real entries, flat indices [rows * k] with -1 sent to row 0)."""
    flat = idx.clamp(min=0).view(-1)
    return kv.index_select(0, flat).view(*idx.shape, kv.shape[1]), idx >= 0, flat


def _probabilities(q: Tensor, rows: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax [rows, H, k] over the real entries and its log-sum-exp [rows, H]; a row with none gives 0 and -inf."""
    logits = torch.bmm(q, rows.transpose(1, 2)).mul_(scale).masked_fill_(~mask.unsqueeze(1), -torch.inf)
    lse = logits.logsumexp(-1)
    safe = lse.masked_fill(lse == -torch.inf, 0.0)
    return logits.sub_(safe.unsqueeze(-1)).exp_(), lse


class _SparseMLA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, kv: Tensor, idx: Tensor, scale: float, value_dim: int, block: int | None):
        dtype = compute_dtype(q, kv)
        kv_c = kv.to(dtype)
        out = torch.empty(*q.shape[:2], value_dim, dtype=dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=dtype, device=q.device)
        with no_autocast(q):
            for start, stop in selection_blocks(idx, kv.shape[1], block):
                rows, mask, _ = gather_rows(kv_c, idx[start:stop])
                p, lse[start:stop] = _probabilities(q[start:stop].to(dtype), rows, mask, scale)
                out[start:stop] = torch.bmm(p, rows[..., :value_dim])
        ctx.save_for_backward(q, kv, idx, out)
        ctx.scale, ctx.value_dim, ctx.block = scale, value_dim, block
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, d_out: Tensor, _d_lse: Tensor):
        q, kv, idx, out = ctx.saved_tensors
        dtype, scale, value_dim = out.dtype, ctx.scale, ctx.value_dim
        kv_c = kv.to(dtype)
        d_q = torch.empty(q.shape, dtype=dtype, device=q.device)
        d_kv = torch.zeros(kv.shape, dtype=dtype, device=q.device)
        with no_autocast(q):
            for start, stop in selection_blocks(idx, 2 * kv.shape[1], ctx.block):
                rows, mask, flat = gather_rows(kv_c, idx[start:stop])
                q_b, d_out_b = q[start:stop].to(dtype), d_out[start:stop].to(dtype)
                p, _ = _probabilities(q_b, rows, mask, scale)
                delta = (d_out_b * out[start:stop]).sum(-1, keepdim=True)
                d_p = torch.bmm(d_out_b, rows[..., :value_dim].transpose(1, 2))
                d_logits = d_p.sub_(delta).mul_(p).mul_(scale)
                d_q[start:stop] = torch.bmm(d_logits, rows)
                d_rows = torch.bmm(d_logits.transpose(1, 2), q_b)
                d_rows[..., :value_dim] += torch.bmm(p.transpose(1, 2), d_out_b)
                d_kv.index_add_(0, flat, d_rows.view(flat.shape[0], -1))
        return d_q.to(q.dtype), d_kv.to(kv.dtype), None, None, None, None


def sparse_mla(
    q: Tensor, kv: Tensor, idx: Tensor, scale: float, value_dim: int, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of q [T, H, Dc+Dr] over rows idx [T, k] (-1 padded) of kv [T, Dc+Dr].

    Returns: out [T, H, value_dim] and the natural log-sum-exp [T, H] of the scaled logits (no gradient passes through
    it). A row with nothing selected gives out 0 and lse -inf.
    """
    return _SparseMLA.apply(q, kv, idx, scale, value_dim, block)
