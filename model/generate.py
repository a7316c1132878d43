"""Decoding with the latent-KV and index-key cache, and sampling: used by rollouts and by evaluation.

Attention runs absorbed: a cached token is one shared row [c_kv | k_rope] and one index key, whatever the number of
heads. A decode step past index_topk tokens gathers only the selected rows. Each sample draws from its own seed, so its
tokens do not depend on who shares the batch (up to the rounding of a matrix product with another number of rows).
Log-probabilities are those of the distribution that was sampled from: after temperature and top-p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.mla import MLA
from model.moe import MoE
from model.ops.common import no_autocast, topk_indices, topk_mask
from model.ops.index_topk.fp8 import rounded
from model.rope import rope_table
from model.transformer import Layer, Transformer

PREFILL_CHUNK = 128
MAX_BATCH = 256


@dataclass(frozen=True)
class Generation:
    """One sample: `ids` (eos included), `logprobs` of each as it was sampled, finish_reason `stop` or `length`."""

    ids: list[int]
    logprobs: list[float]
    finish_reason: str


@dataclass
class LayerCache:
    """kv [B, S, C + rope] latents with rotated keys, index_k [B, S, di]."""

    kv: Tensor
    index_k: Tensor


def _attend(
    mla: MLA, x: Tensor, table: tuple[Tensor, Tensor], positions: Tensor, cache: LayerCache, attention: str
) -> Tensor:
    """x [B, n, D] at `positions` [B, n] against the cache, which takes their rows first -> [B, n, D]."""
    p = mla.project(x, *table)
    q, kv = mla.absorb(p)
    at = positions.unsqueeze(-1)
    cache.kv.scatter_(1, at.expand_as(kv), kv.to(cache.kv.dtype))
    q_index, k_index, w = mla.indexer(x, p.q_latent, *table)
    q_index, k_index = q_index.float(), k_index.float()
    if mla.settings.fp8_index:
        q_index, k_index = rounded(q_index), rounded(k_index)
    cache.index_k.scatter_(1, at.expand_as(k_index), k_index)
    length = int(positions.max()) + 1
    rows, index_rows = cache.kv[:, :length], cache.index_k[:, :length]
    mask = torch.arange(length, device=x.device) <= at  # [B, n, S]
    with no_autocast(x):
        if attention == "sparse" and length > mla.topk:
            products = torch.matmul(q_index.flatten(1, 2), index_rows.transpose(1, 2)).relu_()
            products = products.view(*q_index.shape[:3], length)
            scores = torch.matmul(w.unsqueeze(-2), products).squeeze(-2)
            scores = scores.masked_fill_(~mask, -torch.inf).flatten(0, 1)
            if x.shape[1] == 1:  # a decode step reads the selected rows alone
                chosen = topk_indices(scores, mla.topk).long()
                mask = (chosen >= 0).unsqueeze(1)
                rows = rows.gather(1, chosen.clamp(min=0).unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
            else:
                mask = topk_mask(scores, mla.topk).view_as(mask)
        logits = torch.matmul(q.float().flatten(1, 2), rows.float().transpose(1, 2)).view(*q.shape[:3], -1) * mla.scale
        weights = logits.masked_fill(~mask.unsqueeze(2), -torch.inf).softmax(-1)
        out = torch.matmul(weights.flatten(1, 2), rows[..., : mla.kv_lora_rank].float()).view(*q.shape[:3], -1)
    return mla.output(out.to(x.dtype))


class Decoder:
    """The cache of a batch and the step that extends it."""

    def __init__(self, net: Transformer, batch: int, capacity: int, attention: str = "sparse") -> None:
        config = net.config
        self.net, self.attention = net, attention
        like = net.embed_tokens.weight
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.cache = [
            LayerCache(
                torch.zeros(batch, capacity, width, dtype=like.dtype, device=like.device),
                torch.zeros(batch, capacity, config.index_head_dim, dtype=torch.float32, device=like.device),
            )
            for _ in range(config.num_hidden_layers)
        ]

    def hidden(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Extends the cache by ids [B, n] at positions [B, n]; returns normed hidden states [B, n, D]."""
        config = self.net.config
        table = rope_table(config.rope, config.qk_rope_head_dim, positions)
        x = self.net.embed_tokens(ids)
        for layer, cache in zip(self.net.layers, self.cache, strict=True):
            assert isinstance(layer, Layer)
            x = x + _attend(layer.self_attn, layer.input_layernorm(x), table, positions, cache, self.attention)
            h = layer.post_attention_layernorm(x)
            x = x + (layer.mlp.mix(h.flatten(0, 1))[0].view_as(x) if isinstance(layer.mlp, MoE) else layer.mlp(h))
        return self.net.norm(x)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Fills the cache with prompts of any lengths; returns the hidden state of each one's last token [B, D].

        Shorter prompts are padded on the right: the rows that padding writes lie past every query that runs before
        decoding overwrites them.
        """
        device = self.net.embed_tokens.weight.device
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        longest = int(lengths.max())
        ids = torch.tensor([[*p, *([0] * (longest - len(p)))] for p in prompts], device=device)
        last: Tensor | None = None
        for start in range(0, longest, PREFILL_CHUNK):
            stop = min(start + PREFILL_CHUNK, longest)
            hidden = self.hidden(ids[:, start:stop], torch.arange(start, stop, device=device).expand(len(prompts), -1))
            picked = hidden[torch.arange(len(prompts), device=device), (lengths - 1 - start).clamp(0, stop - start - 1)]
            inside = ((lengths > start) & (lengths <= stop)).unsqueeze(1)
            last = picked if last is None else torch.where(inside, picked, last)
        assert last is not None
        return last

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows of the batch alone."""
        for cache in self.cache:
            cache.kv, cache.index_k = cache.kv[rows], cache.index_k[rows]


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling of logits [B, V] with one uniform number a row -> token [B] and its processed log-prob [B].

    Temperature 0 is greedy (log-probs at temperature 1); top-p keeps the smallest set of tokens whose mass reaches
    top_p.
    """
    if temperature == 0:
        logp = logits.log_softmax(-1)
        token = logp.argmax(-1)
        return token, logp.gather(1, token.unsqueeze(1)).squeeze(1)
    logp = (logits / temperature).log_softmax(-1)
    if top_p < 1:
        ordered, order = logp.sort(dim=-1, descending=True, stable=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        dropped = torch.zeros_like(logp, dtype=torch.bool).scatter_(1, order, before >= top_p)
        logp = logp.masked_fill(dropped, -torch.inf).log_softmax(-1)
    mass = logp.double().exp().cumsum(-1)
    token = torch.searchsorted(mass, uniform.double().unsqueeze(1) * mass[:, -1:], right=True).squeeze(1)
    token = token.clamp(max=logits.shape[1] - 1)
    return token, logp.gather(1, token.unsqueeze(1)).squeeze(1)


@torch.no_grad()
def generate(
    net: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float,
    top_p: float,
    eos_id: int,
    seeds: Sequence[int],
    attention: str = "sparse",
    done: Callable[[int], object] = lambda finished: None,
) -> list[Generation]:
    """Samples one continuation a prompt; `seeds[i]` alone decides the randomness of sample i. `done` hears, as decoding
    goes on, how many samples have finished since it was last called.

    Raises ValueError for an empty prompt, and where a prompt and its answer would not fit max_position_embeddings.
    """
    assert len(prompts) == len(seeds)
    limit = net.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty: generation needs at least one token to start from")
        if len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {i} of {len(prompt)} tokens plus max_new_tokens={max_new_tokens} exceeds "
                f"max_position_embeddings={limit}: shorten the prompt or lower max_new_tokens"
            )
    # batches of like lengths: prefill pads to the longest
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[Generation | None] = [None] * len(prompts)
    for start in range(0, len(order), MAX_BATCH):
        part = order[start : start + MAX_BATCH]
        batch = _Batch(net, [prompts[i] for i in part], [seeds[i] for i in part], max_new_tokens, attention)
        for i, generation in zip(part, batch.run(temperature, top_p, eos_id, done), strict=True):
            results[i] = generation
    return [g for g in results if g is not None]


class _Batch:
    """Decodes a batch to its end; finished rows leave once they are half of it."""

    def __init__(
        self, net: Transformer, prompts: list[Sequence[int]], seeds: list[int], max_new_tokens: int, attention: str
    ) -> None:
        self.net, self.max_new_tokens = net, max_new_tokens
        self.device = net.embed_tokens.weight.device
        self.lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        self.decoder = Decoder(net, len(prompts), int(self.lengths.max()) + max_new_tokens, attention)
        self.last = self.decoder.prefill(prompts)
        draws = [
            torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds
        ]
        self.uniform = torch.stack(draws).to(self.device)

    def run(self, temperature: float, top_p: float, eos_id: int, done: Callable[[int], object]) -> list[Generation]:
        batch = len(self.lengths)
        ids = torch.full((batch, self.max_new_tokens), -1, device=self.device)
        logps = torch.zeros(batch, self.max_new_tokens, device=self.device)
        live, positions = torch.arange(batch, device=self.device), self.lengths
        running = torch.ones(batch, dtype=torch.bool, device=self.device)
        for step in range(self.max_new_tokens):
            token, logp = sample(self.net.lm_head(self.last), self.uniform[live, step], temperature, top_p)
            ids[live[running], step], logps[live[running], step] = token[running], logp[running].float()
            stopped = running & (token == eos_id)
            running = running & ~stopped
            remaining = int(running.sum())
            if remaining == 0 or step + 1 == self.max_new_tokens:
                done(int(stopped.sum()) + remaining)
                break
            done(int(stopped.sum()))
            if remaining * 2 <= len(live):
                rows = running.nonzero().squeeze(1)
                self.decoder.keep(rows)
                live, token, positions, running = live[rows], token[rows], positions[rows], running[rows]
            self.last = self.decoder.hidden(token.unsqueeze(1), positions.unsqueeze(1)).squeeze(1)
            positions = positions + 1
        out = []
        for row, logp_row in zip(ids.tolist(), logps.tolist(), strict=True):
            tokens = [t for t in row if t >= 0]
            out.append(Generation(tokens, logp_row[: len(tokens)], "stop" if tokens[-1] == eos_id else "length"))
        return out
