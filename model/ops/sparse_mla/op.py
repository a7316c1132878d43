"""sparse_mla as its callers see it: queries absorbed chunk by chunk, backend chosen, gradients made by recomputation.

Saved for backward: the decompressed queries, the latents and rope keys, the indices, the output and its log-sum-exp.
Not saved: absorbed queries (3x the decompressed ones at V3.2's sizes), gathered rows, probabilities.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.ops.common import compute_dtype, no_autocast
from model.ops.settings import DEFAULT, OpSettings
from model.ops.sparse_mla import streaming


class SparseAttention(NamedTuple):
    """out [R, H, C] in the latent space; lse [R, H] natural log-sum-exp of the scaled logits; target [R, k] mean over
    heads of the probabilities (None where it was not asked for). No gradient passes through the last two."""

    out: Tensor
    lse: Tensor
    target: Tensor | None


CHUNK_BYTES = 4 << 20  # of absorbed queries on CPU: they stay in the caches


def _chunks(q: Tensor, width: int, dtype: torch.dtype, settings: OpSettings) -> list[slice]:
    """Cuts the rows of q [R, H, nope] so that the absorbed queries [n, H, width] take a quarter of the workspace: their
    gradients and the blocks need the rest."""
    rows, heads, _ = q.shape
    budget = settings.workspace // 4
    if q.device.type == "cpu":
        budget = min(budget, CHUNK_BYTES)
    step = max(1, budget // (heads * width * dtype.itemsize))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _absorb(q_nope: Tensor, q_rope: Tensor, w_uk: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    """[n, H, nope], [n, H, rope], [H, nope, C] -> [n, H, C + rope]. `in_place`: the product is written where it
    belongs, which saves a GPU a copy and which a CPU does row by row."""
    rows, heads, _ = q_nope.shape
    latent = w_uk.shape[2]
    q = torch.empty(rows, heads, latent + q_rope.shape[2], dtype=dtype, device=q_nope.device)
    factors, target = (q_nope.to(dtype).transpose(0, 1), w_uk.to(dtype)), q[..., :latent].transpose(0, 1)
    if in_place:
        torch.bmm(*factors, out=target)
    else:
        target.copy_(torch.bmm(*factors))
    q[..., latent:] = q_rope
    return q


def _triton_forward(
    q: Tensor, kv: Tensor, idx: Tensor, scale: float, out: Tensor, lse: Tensor, mean: Tensor | None, workspace: int
) -> None:
    """Fills out, lse and, if given, mean, in whichever form is the faster. P takes up to half the workspace."""
    from model.ops.sparse_mla import kernel, written_kernel

    value_dim = out.shape[2]
    if mean is not None and written_kernel.suits(q, kv, value_dim):
        written_kernel.forward(q, kv, idx, scale, value_dim, workspace=workspace // 2, into=(out, lse, mean))
        return
    kernel.forward(q, kv, idx, scale, value_dim, into=(out, lse))
    if mean is not None:
        mean.copy_(kernel.target(q, kv, idx, lse, scale))


class _SparseMLA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_nope, q_rope, w_uk, latent, k_rope, idx, scale, target, settings, block):
        triton = settings.backend == "triton"
        idx = idx.int() if triton else idx
        dtype = q_nope.dtype if triton else compute_dtype(q_nope, latent)
        rows, heads, value_dim = q_nope.shape[0], q_nope.shape[1], latent.shape[1]
        with no_autocast(q_nope):
            kv = torch.cat([latent, k_rope], -1).to(dtype)
            out = torch.empty(rows, heads, value_dim, dtype=dtype, device=kv.device)
            lse = torch.empty(rows, heads, dtype=torch.float32 if triton else dtype, device=kv.device)
            mean = torch.empty(idx.shape, dtype=lse.dtype, device=kv.device) if target else None
            for part in _chunks(q_nope, kv.shape[1], dtype, settings):
                q = _absorb(q_nope[part], q_rope[part], w_uk, dtype, in_place=triton)
                if triton:
                    wanted = None if mean is None else mean[part]
                    _triton_forward(q, kv, idx[part], scale, out[part], lse[part], wanted, settings.workspace)
                else:
                    out[part], lse[part], found = streaming.forward(
                        q, kv, idx[part], scale, value_dim, settings.workspace, target, block
                    )
                    if mean is not None:
                        mean[part] = found
        ctx.save_for_backward(q_nope, q_rope, w_uk, latent, k_rope, idx, out, lse)
        ctx.scale, ctx.settings, ctx.block = scale, settings, block
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*([lse] if mean is None else [lse, mean]))
        return out, lse, mean

    @staticmethod
    def backward(ctx, d_out, _d_lse, _d_target):
        q_nope, q_rope, w_uk, latent, k_rope, idx, out, lse = ctx.saved_tensors
        if d_out is None:
            return (None,) * 10
        triton, dtype, width = ctx.settings.backend == "triton", out.dtype, latent.shape[1]
        accumulate = compute_dtype(out)
        d_nope, d_rope = torch.empty_like(q_nope), torch.empty_like(q_rope)
        with no_autocast(q_nope):
            kv = torch.cat([latent, k_rope], -1).to(dtype)
            d_kv = torch.zeros(kv.shape, dtype=accumulate, device=kv.device)
            d_w = torch.zeros(w_uk.shape, dtype=accumulate, device=kv.device)
            w = w_uk.to(dtype)
            for part in _chunks(q_nope, kv.shape[1], dtype, ctx.settings):
                q, d_out_b = _absorb(q_nope[part], q_rope[part], w_uk, dtype, in_place=triton), d_out[part].to(dtype)
                if triton:
                    from model.ops.sparse_mla import kernel, written_kernel

                    form = written_kernel if written_kernel.suits(q, kv, width) else kernel
                    d_q = form.backward(
                        q, kv, idx[part], out[part], lse[part], d_out_b, ctx.scale, d_kv,
                        deterministic=ctx.settings.deterministic, workspace=ctx.settings.workspace // 2,
                    )  # fmt: skip
                else:
                    d_q = streaming.backward(
                        q, kv, idx[part], out[part], d_out_b, ctx.scale, d_kv, ctx.settings.workspace, ctx.block
                    )
                d_absorbed = d_q[..., :width].transpose(0, 1)  # [H, n, C]
                d_nope[part] = torch.bmm(d_absorbed, w.transpose(1, 2)).transpose(0, 1)
                d_rope[part] = d_q[..., width:]
                d_w += torch.bmm(q_nope[part].to(dtype).permute(1, 2, 0), d_absorbed)
        d_latent, d_k_rope = d_kv.split([width, k_rope.shape[1]], -1)
        given = (d_w.to(w_uk.dtype), d_latent.to(latent.dtype), d_k_rope.to(k_rope.dtype))
        return d_nope, d_rope, *given, None, None, None, None, None


def sparse_mla(
    q_nope: Tensor,
    q_rope: Tensor,
    w_uk: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    idx: Tensor,
    scale: float,
    target: bool = False,
    settings: OpSettings = DEFAULT,
    block: int | None = None,
) -> SparseAttention:
    """Attention of each query row over the rows `idx` names.

    Args: q_nope [R, H, nope], q_rope [R, H, rope], w_uk [H, nope, C] (carries q_nope into the latent space), latent
        [S, C], k_rope [S, rope], idx [R, k] int32 or int64 (distinct, -1 for none), scale of the logits, `target` asks
        for the indexer's target, block (query rows at a time; default by the workspace).
    A row with nothing selected gives out 0, lse -inf and target 0.
    """
    return SparseAttention(*_SparseMLA.apply(q_nope, q_rope, w_uk, latent, k_rope, idx, scale, target, settings, block))
