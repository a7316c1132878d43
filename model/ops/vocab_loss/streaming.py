"""Log-probabilities of given tokens from hidden states, chunked over rows and vocabulary: no [T, V] tensor, ever.

    logp[t] = logit[t, target] - logsumexp_v logit[t, v]        cross-entropy is -logp; GRPO's policy terms use logp
    itself, at the sampler's temperature and over the words that it kept

Forward runs an online log-sum-exp over tiles of the vocabulary and keeps one number a row; backward makes each tile of
logits again. Tiles of many rows and part of the vocabulary, rather than few rows of all of it: the weight and its
gradient pass through the caches once for every ROWS rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model.ops.common import compute_dtype, no_autocast
from model.ops.vocab_loss.kept import KeptSets

IGNORE = -100
TILE_BYTES = 16 << 20  # of fp32 logits
ROWS = 1024


def _tiles(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        tile: tuple[int, int],
        product: torch.dtype,
        temperature: float,
        kept: KeptSets | None,
    ):
        dtype = compute_dtype(hidden, weight)
        rows = (targets != IGNORE).nonzero().squeeze(1)
        logp = torch.zeros(targets.shape[0], dtype=dtype, device=hidden.device)
        lse = torch.empty(rows.shape[0], dtype=dtype, device=hidden.device)
        with no_autocast(hidden):
            w = weight.to(product)
            for part in _tiles(len(rows), tile[0]):
                h, wanted = hidden[rows[part]].to(product), targets[rows[part]]
                sets = None if kept is None else kept.rows(rows[part])
                total = torch.full_like(wanted, -torch.inf, dtype=dtype)
                chosen = torch.zeros_like(total)
                for words in _tiles(len(w), tile[1]):
                    logits = _logits(h, w, words, dtype, temperature, sets)
                    total = torch.logaddexp(total, logits.logsumexp(-1))
                    here = (wanted >= words.start) & (wanted < words.stop)
                    found = logits.gather(1, (wanted - words.start).clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
                    chosen = torch.where(here, found, chosen)
                lse[part] = total
                logp[rows[part]] = chosen - total
        ctx.save_for_backward(hidden, weight, targets, rows, lse)
        ctx.tile, ctx.product, ctx.temperature, ctx.kept = tile, product, temperature, kept
        return logp

    @staticmethod
    def backward(ctx, d_logp: Tensor):
        hidden, weight, targets, rows, lse = ctx.saved_tensors
        dtype, product = lse.dtype, ctx.product
        d_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        d_weight = torch.zeros(weight.shape, dtype=dtype, device=hidden.device) if ctx.needs_input_grad[1] else None
        with no_autocast(hidden):
            w = weight.to(product)
            for part in _tiles(len(rows), ctx.tile[0]):
                h, wanted, upstream = hidden[rows[part]].to(product), targets[rows[part]], d_logp[rows[part], None]
                sets = None if ctx.kept is None else ctx.kept.rows(rows[part])
                upstream = upstream / ctx.temperature
                total = torch.zeros(h.shape, dtype=dtype, device=h.device)
                for words in _tiles(len(w), ctx.tile[1]):
                    p = _logits(h, w, words, dtype, ctx.temperature, sets).sub_(lse[part, None]).exp_()
                    inside = ((wanted >= words.start) & (wanted < words.stop)).nonzero().squeeze(1)
                    d_logits = p.mul_(-upstream)
                    d_logits[inside, wanted[inside] - words.start] += upstream[inside, 0]
                    narrow = d_logits.to(product)
                    total += (narrow @ w[words]).to(dtype)
                    if d_weight is not None:
                        d_weight[words] += (narrow.T @ h).to(dtype)
                d_hidden[rows[part]] = total
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden.to(hidden.dtype), d_weight, None, None, None, None, None


def _logits(
    h: Tensor, w: Tensor, words: slice, dtype: torch.dtype, temperature: float, kept: KeptSets | None
) -> Tensor:
    """A tile [rows, words] of logits over the temperature, -inf for words that are not in the running."""
    logits = (h @ w[words].T).to(dtype)
    if temperature != 1.0:
        logits = logits.div_(temperature)
    return logits if kept is None else logits.masked_fill_(kept.dropped(words), -torch.inf)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int | None = None,
    vocab_chunk: int | None = None,
    temperature: float = 1.0,
    kept: KeptSets | None = None,
) -> Tensor:
    """log softmax(hidden @ weight.T / temperature) at the targets.

    Args: hidden [T, D], weight [V, D], targets [T] int64 (-100: masked), chunk (rows at a time) and vocab_chunk (words
        at a time; default: as many as make 16 MiB of logits), kept: the words of each of T rows that the softmax runs
        over (the target must be among them).
    Returns: [T] fp32 (fp64 for fp64 inputs), 0 where masked. Under autocast the products run in autocast's dtype, the
    log-softmax in fp32.
    """
    device = hidden.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else compute_dtype(hidden, weight)
    chunk = chunk or ROWS
    vocab_chunk = vocab_chunk or max(1, TILE_BYTES // (4 * max(1, min(chunk, len(targets)))))
    return _TokenLogprobs.apply(hidden, weight, targets, (chunk, vocab_chunk), product, temperature, kept)
