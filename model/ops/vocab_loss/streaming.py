"""Log-probabilities of given tokens from hidden states, chunked over rows: no [T, V] tensor in forward or backward.

    logp[t] = logit[t, target] - logsumexp_v logit[t, v]        cross-entropy is -logp; GRPO's policy terms use logp
    itself

Forward keeps one number a row (the log-sum-exp); backward makes each chunk of logits again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.common import compute_dtype, no_autocast

IGNORE = -100
CHUNK_BYTES = 16 << 20


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, product: torch.dtype):
        dtype = compute_dtype(hidden, weight)
        rows = (targets != IGNORE).nonzero().squeeze(1)
        logp = torch.zeros(targets.shape[0], dtype=dtype, device=hidden.device)
        lse = torch.empty(rows.shape[0], dtype=dtype, device=hidden.device)
        with no_autocast(hidden):
            w = weight.to(product)
            for start in range(0, rows.shape[0], chunk):
                part = rows[start : start + chunk]
                logits = (hidden[part].to(product) @ w.T).to(dtype)
                lse[start : start + chunk] = logits.logsumexp(-1)
                logp[part] = logits.gather(1, targets[part, None]).squeeze(1) - lse[start : start + chunk]
        ctx.save_for_backward(hidden, weight, targets, rows, lse)
        ctx.chunk, ctx.product = chunk, product
        return logp

    @staticmethod
    def backward(ctx, d_logp: Tensor):
        hidden, weight, targets, rows, lse = ctx.saved_tensors
        dtype, product = lse.dtype, ctx.product
        d_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        d_weight = torch.zeros(weight.shape, dtype=dtype, device=hidden.device) if ctx.needs_input_grad[1] else None
        with no_autocast(hidden):
            w = weight.to(product)
            for start in range(0, rows.shape[0], ctx.chunk):
                part = rows[start : start + ctx.chunk]
                h = hidden[part].to(product)
                p = (h @ w.T).to(dtype).sub_(lse[start : start + ctx.chunk, None]).exp_()
                g = d_logp[part, None]
                d_logits = p.mul_(-g).scatter_add_(1, targets[part, None], g).to(product)
                d_hidden[part] = (d_logits @ w).to(dtype)
                if d_weight is not None:
                    d_weight += (d_logits.T @ h).to(dtype)
        return d_hidden.to(hidden.dtype), None if d_weight is None else d_weight.to(weight.dtype), None, None, None


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """log softmax(hidden @ weight.T) at the targets.

    Args: hidden [T, D], weight [V, D], targets [T] int64 (-100: masked), chunk (rows at a time; default by a byte
    budget).
    Returns: [T] fp32 (fp64 for fp64 inputs), 0 where masked. Under autocast the products run in autocast's dtype, the
    log-softmax in fp32.
    """
    device = hidden.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else compute_dtype(hidden, weight)
    chunk = chunk or max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    return _TokenLogprobs.apply(hidden, weight, targets, chunk, product)
