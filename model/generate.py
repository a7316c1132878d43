"""Decoding with the latent-KV and index-key cache, and sampling: used by rollouts and by evaluation.

Attention runs absorbed: a cached token is one shared row [c_kv | k_rope] and one index key, whatever the number of
heads. A decode step past index_topk tokens gathers only the selected rows. Samples that finish give their place in the
batch to the next at once, and samples of one prompt read it once.
Each sample draws from its own seed, so its tokens do not depend on who shares the batch (up to the rounding of a matrix
product with another number of rows). Log-probabilities are those of the distribution that was sampled from: after
temperature, top-k and top-p. What a trainer needs to repeat is recorded if asked for: the words kept, the experts
chosen, the positions selected.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.mla import MLA
from model.moe import MoE
from model.ops.common import no_autocast, topk_indices
from model.ops.index_topk.fp8 import rounded
from model.rope import rope_table
from model.transformer import Layer, Transformer

PREFILL_CHUNK = 128
MAX_BATCH = 256


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature 0 is greedy, top_k 0 and top_p 1 keep every word. `record`: what is handed out
    beside them, of `experts` and `selected` (kept words come wherever some are dropped)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    record: frozenset[str] = frozenset()

    @property
    def drops_words(self) -> bool:
        return self.top_p < 1 or self.top_k > 0


@dataclass(frozen=True)
class Ask:
    """One sample to draw: `seed` alone decides its randomness, of which `drawn` numbers are used up already (a sample
    that goes on from `prompt`, what it was cut after)."""

    prompt: Sequence[int]
    seed: int
    max_new_tokens: int
    drawn: int = 0


@dataclass(frozen=True)
class Generation:
    """One sample: `ids` (eos included), `logprobs` of each as it was sampled, finish_reason `stop` or `length`.

    kept: for each id the words that were in the running (None: all, throughout). Of the rows that ran, which are the
    prompt's and all ids but the last: experts [rows, M, K] int16 by MoE layer, selected [rows, L, k] int32 positions,
    ascending, -1 behind.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    kept: list[list[int]] | None = None
    experts: Tensor | None = None
    selected: Tensor | None = None


@dataclass
class LayerCache:
    """kv [B, S, C + rope] latents with rotated keys, index_k [B, S, di]."""

    kv: Tensor
    index_k: Tensor


def _attend(
    mla: MLA,
    x: Tensor,
    table: tuple[Tensor, Tensor],
    positions: Tensor,
    cache: LayerCache,
    attention: str,
    record: list[Tensor] | None,
) -> Tensor:
    """x [B, n, D] at `positions` [B, n] against the cache, which takes their rows first -> [B, n, D]. `record` is
    handed the selection [B, n, k]."""
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
            chosen = topk_indices(scores, mla.topk)
            if record is not None:
                record.append(chosen.view(*at.shape[:2], -1))
            if x.shape[1] == 1:  # a decode step reads the selected rows alone
                chosen = chosen.long()
                mask = (chosen >= 0).unsqueeze(1)
                rows = rows.gather(1, chosen.clamp(min=0).unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
            else:
                held = torch.zeros(len(scores), length + 1, dtype=torch.bool, device=x.device)
                mask = held.scatter_(1, chosen.long() % (length + 1), True)[:, :-1].view_as(mask)  # -1 goes last
        elif attention == "sparse" and record is not None:
            every = torch.arange(mla.topk, dtype=torch.int32, device=x.device)
            record.append(every.where(every <= at, -1))
        logits = torch.matmul(q.float().flatten(1, 2), rows.float().transpose(1, 2)).view(*q.shape[:3], -1) * mla.scale
        weights = logits.masked_fill(~mask.unsqueeze(2), -torch.inf).softmax(-1)
        out = torch.matmul(weights.flatten(1, 2), rows[..., : mla.kv_lora_rank].float()).view(*q.shape[:3], -1)
    return mla.output(out.to(x.dtype))


@dataclass
class _Records:
    """What rows of a batch chose, [B, S, ...] by position; None where it is not asked for."""

    experts: Tensor | None = None
    selected: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.experts, self.selected) if tensor is not None]


class Decoder:
    """The cache of a batch and the step that extends it."""

    def __init__(
        self,
        net: Transformer,
        batch: int,
        capacity: int,
        attention: str = "sparse",
        record: frozenset[str] = frozenset(),
        turn: Callable[[str], object] = lambda kind: None,
    ) -> None:
        config, self.turn = net.config, turn
        self.net, self.attention, self.records = net, attention, _Records()
        like = net.embed_tokens.weight
        width = config.kv_lora_rank + config.qk_rope_head_dim
        layers, device = config.num_hidden_layers, like.device
        self.cache = [
            LayerCache(
                torch.zeros(batch, capacity, width, dtype=like.dtype, device=device),
                torch.zeros(batch, capacity, config.index_head_dim, dtype=torch.float32, device=device),
            )
            for _ in range(layers)
        ]
        if "experts" in record:
            shape = (batch, capacity, layers - config.first_k_dense_replace, config.num_experts_per_tok)
            self.records.experts = torch.full(shape, -1, dtype=torch.int16, device=device)
        if "selected" in record and attention == "sparse":
            shape = (batch, capacity, layers, config.index_topk)
            self.records.selected = torch.full(shape, -1, dtype=torch.int32, device=device)

    def hidden(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Extends the cache by ids [B, n] at positions [B, n]; returns normed hidden states [B, n, D]."""
        self.turn("hidden")
        config, experts = self.net.config, []
        selected: list[Tensor] | None = None if self.records.selected is None else []
        table = rope_table(config.rope, config.qk_rope_head_dim, positions)
        x = self.net.embed_tokens(ids)
        for layer, cache in zip(self.net.layers, self.cache, strict=True):
            assert isinstance(layer, Layer)
            h = layer.input_layernorm(x)
            x = x + _attend(layer.self_attn, h, table, positions, cache, self.attention, selected)
            h = layer.post_attention_layernorm(x)
            if isinstance(layer.mlp, MoE):
                out, routing = layer.mlp.mix(h.flatten(0, 1))
                experts.append(routing.experts.view(*ids.shape, -1))
                x = x + out.view_as(x)
            else:
                x = x + layer.mlp(h)
        for held, made in ((self.records.experts, experts), (self.records.selected, selected)):
            if held is not None and made:
                found = torch.stack(made, 2).to(held.dtype)
                held.scatter_(1, positions[..., None, None].expand_as(found), found)
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

    def tensors(self) -> list[Tensor]:
        """Everything that a place in the batch holds, [B, S, ...] each."""
        return [tensor for cache in self.cache for tensor in (cache.kv, cache.index_k)] + self.records.tensors()

    def take(self, place: int, other: Decoder, index: int, length: int) -> None:
        """The first `length` rows of another decoder's `index` become those of `place` here."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine[place, :length] = theirs[index, :length]

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows of the batch alone."""
        for cache in self.cache:
            cache.kv, cache.index_k = cache.kv[rows], cache.index_k[rows]
        records = self.records
        records.experts = None if records.experts is None else records.experts[rows]
        records.selected = None if records.selected is None else records.selected[rows]


def sample(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inverse-CDF sampling of logits [B, V] with one uniform number a row -> token [B], its processed log-prob [B], and
    the words that were in the running [B, V] bool (None: all).

    Temperature 0 is greedy (log-probs at temperature 1). top-k keeps the k likeliest words (of equal ones the lower
    number), top-p the smallest set of those whose mass reaches top_p.
    """
    if sampling.temperature == 0:
        logp = logits.log_softmax(-1)
        token = logp.argmax(-1)
        return token, logp.gather(1, token.unsqueeze(1)).squeeze(1), None
    logp = (logits / sampling.temperature).log_softmax(-1)
    kept = None
    if sampling.drops_words:
        ordered, order = logp.sort(dim=-1, descending=True, stable=True)
        dropped = torch.zeros_like(ordered, dtype=torch.bool)
        if sampling.top_k:
            dropped[:, sampling.top_k :] = True
            ordered = ordered.masked_fill(dropped, -torch.inf).log_softmax(-1)
        if sampling.top_p < 1:
            dropped |= ordered.exp().cumsum(-1) - ordered.exp() >= sampling.top_p
        kept = torch.zeros_like(dropped).scatter_(1, order, ~dropped)
        logp = logp.masked_fill(~kept, -torch.inf).log_softmax(-1)
    mass = logp.double().exp().cumsum(-1)
    token = torch.searchsorted(mass, uniform.double().unsqueeze(1) * mass[:, -1:], right=True).squeeze(1)
    token = token.clamp(max=logits.shape[1] - 1)
    return token, logp.gather(1, token.unsqueeze(1)).squeeze(1), kept


@torch.no_grad()
def generate(
    net: Transformer,
    asks: Sequence[Ask],
    sampling: Sampling,
    eos_id: int,
    attention: str = "sparse",
    done: Callable[[int], object] = lambda finished: None,
    stopped: Callable[[int, list[int]], bool] | None = None,
    max_batch: int = MAX_BATCH,
    turn: Callable[[str], object] = lambda kind: None,
) -> list[Generation]:
    """One continuation an ask, in their order. `done` hears, as decoding goes on, how many samples have finished since
    it was last called; `stopped` says of the ids drawn for an ask (its number) whether they end it (stop strings),
    beside eos; it is asked after every other token, and must not change the list. `turn` is called before every
    forward, with its kind: `hidden` (the layers) or `head`.

    Raises ValueError for an empty prompt, and where a prompt and its answer would not fit max_position_embeddings.
    """
    assert all(ask.max_new_tokens > 0 for ask in asks)
    limit = net.config.max_position_embeddings
    for i, ask in enumerate(asks):
        if not ask.prompt:
            raise ValueError(f"prompt {i} is empty: generation needs at least one token to start from")
        if len(ask.prompt) + ask.max_new_tokens > limit:
            raise ValueError(
                f"prompt {i} of {len(ask.prompt)} tokens plus max_new_tokens={ask.max_new_tokens} exceeds "
                f"max_position_embeddings={limit}: shorten the prompt or lower max_new_tokens"
            )
    return _Batch(net, asks, sampling, eos_id, attention, stopped, max_batch, turn).run(done) if asks else []


class _Batch:
    """A batch of places: each holds one sample until that is finished, then the next one that waits.

    Tensors by place: `asked` number of the ask, `position` of the next token, `step` tokens drawn, `running`, `last`
    hidden state [D], `ids`, `logps` and `uniform` [max_new_tokens].
    """

    def __init__(
        self,
        net: Transformer,
        asks: Sequence[Ask],
        sampling: Sampling,
        eos_id: int,
        attention: str,
        stopped: Callable[[int, list[int]], bool] | None,
        max_batch: int,
        turn: Callable[[str], object],
    ) -> None:
        self.net, self.asks, self.sampling, self.eos_id = net, asks, sampling, eos_id
        self.attention, self.stopped, self.turn = attention, stopped, turn
        self.device = net.embed_tokens.weight.device
        # like prompts together: they are read once, and prefill pads to the longest
        self.waiting = deque(sorted(range(len(asks)), key=lambda i: (len(asks[i].prompt), tuple(asks[i].prompt))))
        self.read: dict[tuple[int, ...], tuple[Decoder, int, Tensor]] = {}  # prompts that samples still wait for
        places, longest = min(max_batch, len(asks)), max(ask.max_new_tokens for ask in asks)
        capacity = max(len(ask.prompt) + ask.max_new_tokens for ask in asks)
        self.decoder = Decoder(net, places, capacity, attention, sampling.record, turn)
        self.asked = [-1] * places
        self.kept: list[list[list[int]]] = [[] for _ in range(places)]
        self.said: list[list[int]] = [[] for _ in range(places)]
        self.position = torch.zeros(places, dtype=torch.int64, device=self.device)
        self.step, self.budget = torch.zeros_like(self.position), torch.zeros_like(self.position)
        self.running = torch.zeros(places, dtype=torch.bool, device=self.device)
        self.last: Tensor | None = None
        self.ids = torch.zeros(places, longest, dtype=torch.int64, device=self.device)
        self.logps = torch.zeros(places, longest, device=self.device)
        self.uniform = torch.zeros(places, longest, dtype=torch.float64, device=self.device)
        self.found: list[Generation | None] = [None] * len(asks)

    def run(self, done: Callable[[int], object]) -> list[Generation]:
        while True:
            self._admit()
            if not self.running.any():
                break
            finished = self._draw()
            done(len(finished))
            self._leave(finished)
        return [each for each in self.found if each is not None]

    def _admit(self) -> None:
        """Gives every free place to a sample that waits."""
        free = (~self.running).nonzero().squeeze(1).tolist() if self.waiting else []
        taken = {place: self.waiting.popleft() for place in free[: len(self.waiting)]}
        if not taken:
            return
        prompts = {place: tuple(self.asks[i].prompt) for place, i in taken.items()}
        self._read({prompt for prompt in prompts.values() if prompt not in self.read})
        for place, i in taken.items():
            ask, (decoder, index, last) = self.asks[i], self.read[prompts[place]]
            self.decoder.take(place, decoder, index, len(ask.prompt))
            if self.last is None:
                self.last = last.new_zeros(len(self.asked), last.shape[-1])
            self.asked[place], self.kept[place], self.said[place], self.last[place] = i, [], [], last
            self.position[place], self.step[place], self.budget[place] = len(ask.prompt), 0, ask.max_new_tokens
            self.running[place] = True
            generator = torch.Generator().manual_seed(ask.seed)
            drawn = torch.rand(ask.drawn + ask.max_new_tokens, generator=generator, dtype=torch.float64)
            self.uniform[place, : ask.max_new_tokens] = drawn[ask.drawn :]
        wanted = {tuple(self.asks[i].prompt) for i in self.waiting}
        self.read = {prompt: held for prompt, held in self.read.items() if prompt in wanted}

    def _read(self, prompts: set[tuple[int, ...]]) -> None:
        """Prefills each of them once."""
        if prompts:
            each = sorted(prompts)
            longest = max(len(prompt) for prompt in each)
            decoder = Decoder(self.net, len(each), longest, self.attention, self.sampling.record, self.turn)
            last = decoder.prefill(each)
            self.read |= {prompt: (decoder, index, last[index]) for index, prompt in enumerate(each)}

    def _draw(self) -> list[int]:
        """One more token for every place that runs -> the places that are finished."""
        assert self.last is not None
        places = torch.arange(len(self.asked), device=self.device)
        at = self.step.clamp(max=self.ids.shape[1] - 1)
        self.turn("head")
        token, logp, kept = sample(self.net.lm_head(self.last), self.uniform[places, at], self.sampling)
        live = self.running.nonzero().squeeze(1)
        self.ids[live, at[live]], self.logps[live, at[live]] = token[live], logp[live].float()
        if kept is not None:
            for place in live.tolist():
                self.kept[place].append(kept[place].nonzero().squeeze(1).tolist())
        self.step += self.running
        said_all = token == self.eos_id
        if self.stopped is not None:
            said_all = said_all.logical_or(self._stopped(live.tolist(), token.tolist()))
        ended = said_all | (self.step >= self.budget)
        finished = (self.running & ended).nonzero().squeeze(1).tolist()
        for place in finished:
            self._finish(place, "stop" if said_all[place] else "length")
        self.running &= ~ended
        if self.running.any():
            # a place that is free runs along on its last position and is overwritten by whoever takes it
            at = self.position.clamp(max=self.decoder.cache[0].kv.shape[1] - 1)
            self.last = self.decoder.hidden(token.unsqueeze(1), at.unsqueeze(1)).squeeze(1)
        self.position += self.running
        return finished

    def _stopped(self, live: list[int], token: list[int]) -> Tensor:
        """[B] which places' tokens end their samples, eos apart; `said` holds the ids of each as a list that grows."""
        assert self.stopped is not None
        found = [False] * len(token)
        for place in live:
            self.said[place].append(token[place])
            if token[place] != self.eos_id:
                found[place] = self.stopped(self.asked[place], self.said[place])
        return torch.tensor(found, device=self.device)

    def _finish(self, place: int, reason: str) -> None:
        size, ask = int(self.step[place]), self.asks[self.asked[place]]
        ids, rows = self.ids[place, :size].tolist(), len(ask.prompt) + size - 1
        records = self.decoder.records
        self.found[self.asked[place]] = Generation(
            ids,
            self.logps[place, :size].tolist(),
            reason,
            self.kept[place] if self.sampling.drops_words and self.sampling.temperature > 0 else None,
            None if records.experts is None else records.experts[place, :rows].to("cpu", copy=True),
            None if records.selected is None else records.selected[place, :rows].to("cpu", copy=True),
        )

    def _leave(self, finished: list[int]) -> None:
        """Where nobody waits any more, the batch shrinks once half of it is free."""
        rows = self.running.nonzero().squeeze(1)
        if not finished or self.waiting or not 0 < len(rows) * 2 <= len(self.asked):
            return
        assert self.last is not None
        self.decoder.keep(rows)
        self.asked, self.kept = [self.asked[i] for i in rows], [self.kept[i] for i in rows]
        self.said = [self.said[i] for i in rows]
        for name in ("position", "step", "budget", "running", "last", "ids", "logps", "uniform"):
            setattr(self, name, getattr(self, name)[rows])
