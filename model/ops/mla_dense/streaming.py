"""Dense attention in the decompressed form, document by document through torch's SDPA.

One causal call a document needs no [T, T] mask. CPU's flash kernel wants equal query and value widths and otherwise
falls silently to the quadratic math path, so the narrower of the two is padded with zeros, which changes nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.common import Hidden, compute_dtype, query_blocks, segments
from model.ops.settings import OpSettings


def by_document(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, scale: float) -> Tensor:
    """mla_dense of a whole sequence, differentiable by SDPA's own backward."""
    value_dim, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
    q, k, v = (F.pad(t, (0, width - t.shape[-1])).transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    outputs, end = [], 0
    for start, stop in segments(doc_start):
        assert start == end, "documents follow one another without a gap"
        q_doc, k_doc, v_doc = (t[:, :, start:stop] for t in (q, k, v))
        outputs.append(F.scaled_dot_product_attention(q_doc, k_doc, v_doc, is_causal=True, scale=scale))
        end = stop
    if end < q.shape[2]:
        outputs.append(torch.zeros_like(v[:, :, end:]))
    return torch.cat(outputs, 2).squeeze(0).transpose(0, 1)[..., :value_dim]


def with_lse(
    q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor, scale: float, q_pos: Tensor | None, settings: OpSettings
) -> tuple[Tensor, Tensor]:
    """mla_dense_lse over query blocks: one head at a time against all keys that the block sees."""
    dtype = compute_dtype(q)
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)
    for b in query_blocks(doc_start, q_pos, 3 * dtype.itemsize, settings):
        hidden = Hidden(doc_start, q_pos, b)
        for h in range(q.shape[1]):
            logits = hidden.fill(q[b.rows, h].to(dtype) @ k[b.keys, h].to(dtype).T * scale, -torch.inf)
            found = logits.logsumexp(-1, keepdim=True)
            probabilities = hidden.fill(logits.sub_(found).exp_(), 0.0)  # -inf - -inf in a row that sees nothing
            out[b.rows, h] = (probabilities @ v[b.keys, h].to(dtype)).to(q.dtype)
            lse[b.rows, h] = found.squeeze(1)
    return out, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    doc_start: Tensor,
    scale: float,
    q_pos: Tensor | None,
    settings: OpSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from recomputed probabilities (FlashAttention-2, arXiv 2307.08691, sec. 3.1):
    dS = P * (dO V^T - sum(dO * O))."""
    dtype = compute_dtype(q)
    d_q = torch.zeros_like(q)
    d_k, d_v = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (k, v))
    for b in query_blocks(doc_start, q_pos, 4 * dtype.itemsize, settings):
        hidden = Hidden(doc_start, q_pos, b)
        for h in range(q.shape[1]):
            q_b, k_b, v_b = (t[part, h].to(dtype) for t, part in ((q, b.rows), (k, b.keys), (v, b.keys)))
            d_b = d_out[b.rows, h].to(dtype)
            p = hidden.fill((q_b @ k_b.T).mul_(scale).sub_(lse[b.rows, h, None]).exp_(), 0.0)
            d_v[b.keys, h] += p.T @ d_b
            mean = (d_b * out[b.rows, h].to(dtype)).sum(-1, keepdim=True)
            d_scores = (d_b @ v_b.T).sub_(mean).mul_(p).mul_(scale)
            d_q[b.rows, h] = (d_scores @ k_b).to(q.dtype)
            d_k[b.keys, h] += d_scores.T @ q_b
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype)
