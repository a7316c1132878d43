"""The model: DeepSeek-V3 with a lightning indexer in every layer and multi-token prediction behind (V3 sec. 2, V3.2
sec. 2.1).

The native form is one packed sequence of T tokens; `doc_start[t]` is the first position t may see. Parameters carry
Hugging Face's names, so that `model/hf.py` is a table. Shapes: T tokens, D hidden, V vocabulary, L layers (MTP's
behind the main ones), E routed experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conf.schema import ModelConfig
from model.context import Context
from model.fill import Share, fill
from model.indexer import LightningIndexer
from model.layers import MLP, Linear, LMHead, RMSNorm
from model.mla import MLA, KVUpProjection
from model.moe import Experts, MoE, Router
from model.ops.common import IndexKL
from model.ops.settings import OpSettings
from model.ops.vocab_loss import KeptSets
from model.replay import LayerReplay, Replay
from model.rope import rope_table

GREEDY_ROWS = 256  # rows whose logits exist at a time
INDEXER_INIT = 0.02  # standard deviation of a fresh indexer's matrices, whatever the trunk started from


@dataclass
class ForwardOutput:
    """Sums over the tokens of one sequence; the loop normalises them by global counts."""

    token_logprobs: Tensor | None  # [T] log p(labels[t]), 0 where masked; differentiable
    mtp_logprobs: Tensor | None  # [T] the same for mtp_labels
    balance: Tensor  # sequence-wise balance loss, summed over MoE layers
    indexer_kl: Tensor | None  # [L] sum over rows of the indexer's KL; differentiable
    expert_counts: Tensor  # [MoE layers, E] tokens routed
    # [L] sums over rows: kl_uniform, mass, oracle_mass, rows; by_row [L, len(row_topk), 3, R] where it was asked for
    stats: dict[str, Tensor]
    num_rows: Tensor  # real rows of the sequence
    replay: dict[str, Tensor]  # with a record: routes [MoE layers, 2], selection [L, 2] (see model/replay.py)
    greedy: Tensor | None = None  # [T] the likeliest token where there is a label, -1 elsewhere
    hidden: Tensor | None = None  # [T, D] what the next part goes on from; of a part that is not the last


@dataclass(frozen=True)
class Part:
    """A run of neighbouring layers, `first` to `end - 1` of `layers`, where a model is cut in depth. The one that
    `begins` has the embedding, the one that `ends` the final norm, the head and MTP (and an embedding for it)."""

    first: int
    end: int
    layers: int

    @property
    def begins(self) -> bool:
        return self.first == 0

    @property
    def ends(self) -> bool:
        return self.end == self.layers


@dataclass(frozen=True)
class _Request:
    """What the caller of forward asked each layer for, and the rows that it is asked about."""

    context: Context
    attention: str
    indexer_loss: str | None
    stats: bool
    replay: LayerReplay | None = None  # of the layer that is asked
    row_topk: tuple[int, ...] = ()


class _LayerReport(NamedTuple):
    """What a layer says beside its output."""

    kl: IndexKL | None
    moe: tuple[Tensor, Tensor] | None  # tokens of each expert, balance loss
    routes: Tensor | None
    selection: Tensor | None


class Layer(nn.Module):
    """norm -> MLA -> residual, norm -> MLP or MoE -> residual."""

    def __init__(self, config: ModelConfig, moe: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MoE | MLP = MoE(config) if moe else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, request: _Request) -> tuple[Tensor, _LayerReport]:
        attended, index, selection = self.self_attn(
            self.input_layernorm(x),
            cos,
            sin,
            request.context,
            request.attention,
            request.indexer_loss,
            request.stats,
            request.replay,
            request.row_topk,
        )
        x = x + attended
        h = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            out, counts, balance, routes = self.mlp(h, request.context, request.replay)
            return x + out, _LayerReport(index, (counts, balance), routes, selection)
        return x + self.mlp(h), _LayerReport(index, None, None, selection)


class MTPModule(nn.Module):
    """Multi-token prediction (V3, sec. 2.2): predicts token t+2 from the trunk's state at t and the embedding of
    t+1."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = Layer(config, moe=True)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def combine(self, hidden: Tensor, next_embedding: Tensor) -> Tensor:
        return self.eh_proj(torch.cat([self.enorm(next_embedding), self.hnorm(hidden)], -1))


class _Collector:
    """Gathers what the layers report, in layer order."""

    def __init__(self) -> None:
        self.kl: list[IndexKL] = []
        self.counts: list[Tensor] = []
        self.balance: list[Tensor] = []
        self.replay: dict[str, list[Tensor]] = {"routes": [], "selection": []}

    def add(self, report: _LayerReport) -> None:
        if report.kl is not None:
            self.kl.append(report.kl)
        if report.moe is not None:
            self.counts.append(report.moe[0])
            self.balance.append(report.moe[1])
        for name, found in self.replay.items():
            value = getattr(report, name)
            if value is not None:
                found.append(value)


class Transformer(nn.Module):
    """See the module's head. `activation_checkpointing` recomputes each layer in backward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, i >= config.first_k_dense_replace) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size)
        self.mtp = nn.ModuleList(MTPModule(config) for _ in range(config.num_mtp_layers))

    def keep(self, parts: Iterable[Part]) -> None:
        """Drops what none of `parts` has; names stay. Only `forward` with one of these parts runs then."""
        parts = list(parts)
        begins, ends = any(part.begins for part in parts), any(part.ends for part in parts)
        for number in range(self.config.num_hidden_layers):
            if not any(part.first <= number < part.end for part in parts):
                self.layers[number] = None  # type: ignore[assignment]
        if not begins and not (ends and len(self.mtp)):
            self.embed_tokens = None  # type: ignore[assignment]
        if not ends:
            self.norm = self.lm_head = None  # type: ignore[assignment]
            self.mtp = nn.ModuleList()

    def use(self, settings: OpSettings) -> None:
        """Sets how the ops of every layer run: backend, workspace, precision of the selection and of the linears."""
        for module in self.modules():
            if isinstance(module, MLA | KVUpProjection | LightningIndexer | Linear | Experts):
                module.settings = settings

    def forward(
        self,
        input_ids: Tensor,
        next_ids: Tensor,
        labels: Tensor,
        mtp_labels: Tensor,
        positions: Tensor,
        doc_start: Tensor,
        *,
        attention: str = "sparse",
        indexer_loss: str | None = None,
        lm_loss: bool = True,
        trunk_grad: bool = True,
        stats: bool = False,
        mtp: bool = True,
        context: Context | None = None,
        replay: Replay | None = None,
        temperature: float = 1.0,
        kept: KeptSets | None = None,
        greedy: bool = False,
        row_topk: tuple[int, ...] = (),
        part: Part | None = None,
        hidden: Tensor | None = None,
    ) -> ForwardOutput:
        """One packed sequence, or the rows of it that `context` describes; all tensors [R] int64 (see
        `data/packing.py`).

        attention: `dense` or `sparse` (top-k); indexer_loss: None, `dense` (all visible positions; needs dense
        attention) or `selected` (over S_t; needs sparse); trunk_grad False runs everything but the indexer's loss under
        no_grad; stats adds the indexer's health sums, and `row_topk`, under the dense loss, what selections of those
        sizes are worth row by row (`by_row` of model/ops/index_kl_dense/op.py); mtp False leaves the MTP modules out.
        Of a sampler: `replay` has its choices in the trunk repeated, token_logprobs are at its `temperature` and over
        the words `kept` of [R]. greedy adds the likeliest token of each labelled row (logits of those rows alone are
        made). `part`: only these layers run, from the states `hidden` [R, D] of the part before.
        """
        if indexer_loss is not None and (attention, indexer_loss) not in (("dense", "dense"), ("sparse", "selected")):
            raise ValueError(f"indexer_loss={indexer_loss!r} cannot be taken under attention={attention!r}")
        context = context or Context.whole(doc_start)
        part = part or Part(0, len(self.layers), len(self.layers))
        request = _Request(context, attention, indexer_loss, stats, row_topk=row_topk)
        found = _Collector()
        mtp_logprobs = None
        # MTP serves the losses alone: its own, and in the indexer's stages that of its indexer. What runs must not
        # depend on the data: ranks that share experts or a sequence meet in every layer.
        with_mtp = mtp and part.ends and len(self.mtp) > 0 and (indexer_loss is not None or lm_loss)
        # a frozen trunk records nothing anyway, and without recording ZeRO-3's hooks would cut the indexers' losses off
        frozen = not any(p.requires_grad for name, p in self.named_parameters() if ".indexer." not in name)
        with torch.set_grad_enabled(torch.is_grad_enabled() and (trunk_grad or frozen)):
            table = rope_table(self.config.rope, self.config.qk_rope_head_dim, positions)
            hidden = self.embed_tokens(input_ids) if hidden is None else hidden
            hidden = self._layers(hidden, table, request, found, part, replay)
            token_logprobs = self.lm_head(hidden, labels, temperature, kept) if lm_loss and part.ends else None
            likeliest = self._greedy(hidden, labels) if greedy else None
            if with_mtp:
                mtp_hidden = self._mtp(hidden, next_ids, table, request, found)
                mtp_logprobs = self.lm_head(mtp_hidden, mtp_labels) if lm_loss else None
        names = found.kl[0].stats if found.kl else {}
        empty = torch.zeros(0, self.config.n_routed_experts, dtype=torch.int64)
        return ForwardOutput(
            token_logprobs,
            mtp_logprobs,
            torch.stack(found.balance).sum() if found.balance else hidden.new_zeros(()),
            torch.stack([index.kl_sum for index in found.kl]) if found.kl else None,
            torch.stack(found.counts) if found.counts else empty,
            {name: torch.stack([index.stats[name] for index in found.kl]) for name in names},
            context.real.sum(),
            {name: torch.stack(rows) for name, rows in found.replay.items() if rows},
            likeliest,
            None if part.ends else hidden,
        )

    def _greedy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        rows = (labels >= 0).nonzero().squeeze(1)
        found = torch.full_like(labels, -1)
        for part in rows.split(GREEDY_ROWS):
            found[part] = self.lm_head(hidden[part]).argmax(-1)
        return found

    def _layers(
        self,
        x: Tensor,
        table: tuple[Tensor, Tensor],
        request: _Request,
        found: _Collector,
        part: Part,
        replay: Replay | None = None,
    ) -> Tensor:
        first_moe = self.config.first_k_dense_replace
        for number in range(part.first, part.end):
            record = None
            if replay is not None:
                record = replay.layer(number, number - first_moe if number >= first_moe else None)
            x, report = self._run(self.layers[number], x, table, replace(request, replay=record))
            found.add(report)
        return self.norm(x) if part.ends else x

    def _mtp(
        self,
        hidden: Tensor,
        next_ids: Tensor,
        table: tuple[Tensor, Tensor],
        request: _Request,
        found: _Collector,
    ) -> Tensor:
        module = self.mtp[0]
        assert isinstance(module, MTPModule)
        x = module.combine(hidden, self.embed_tokens(next_ids))
        x, report = self._run(module.layer, x, table, request)
        found.add(report)
        return module.norm(x)

    def _run(self, layer: nn.Module, x: Tensor, table: tuple[Tensor, Tensor], request: _Request):
        if self.activation_checkpointing and x.requires_grad:
            return checkpoint(layer, x, *table, request, use_reentrant=False)
        return layer(x, *table, request)

    def hidden(self, input_ids: Tensor, doc_start: Tensor, attention: str) -> Tensor:
        """One packed sequence [T] -> the normed states [T, D] that `lm_head` reads."""
        positions = (torch.arange(len(input_ids), device=input_ids.device) - doc_start).clamp(min=0)
        table = rope_table(self.config.rope, self.config.qk_rope_head_dim, positions)
        request = _Request(Context.whole(doc_start), attention, None, False)
        whole = Part(0, len(self.layers), len(self.layers))
        return self._layers(self.embed_tokens(input_ids), table, request, _Collector(), whole)

    def logits(self, input_ids: Tensor, doc_start: Tensor | None = None, attention: str = "sparse") -> Tensor:
        """input_ids [B, T] (and doc_start [B, T]) -> logits [B, T, V] fp32. For tests and notebooks: this makes [T,
        V]."""
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [B, T], got shape {tuple(input_ids.shape)}")
        if attention not in ("dense", "sparse"):
            raise ValueError(f"attention must be 'dense' or 'sparse', got {attention!r}")
        starts = torch.zeros_like(input_ids) if doc_start is None else doc_start.view_as(input_ids)
        pairs = zip(input_ids, starts, strict=True)
        return torch.stack([self.lm_head(self.hidden(ids, start, attention)) for ids, start in pairs])

    @property
    def first_expert(self) -> int:
        """Number of the first routed expert that this process holds."""
        held = [module.first for module in self.modules() if isinstance(module, Experts)]
        return held[0] if held else 0

    @contextmanager
    def selecting(self, topk: int) -> Iterator[None]:
        """Sparse attention over `topk` tokens instead of the configuration's, for a while."""
        layers = [module for module in self.modules() if isinstance(module, MLA)]
        before = [layer.topk for layer in layers]
        for layer in layers:
            layer.topk = topk
        try:
            yield
        finally:
            for layer, held in zip(layers, before, strict=True):
                layer.topk = held

    def indexer_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of every lightning indexer, MTP's included."""
        return [(name, p) for name, p in self.named_parameters() if ".indexer." in name]

    def routers(self) -> list[Router]:
        """In the order of `ForwardOutput.expert_counts`: main layers, then MTP's."""
        return [module for module in self.modules() if isinstance(module, Router)]

    @torch.no_grad()
    def update_router_bias(self, counts: Tensor, speed: float) -> None:
        """Aux-loss-free balancing: raise the bias of under-used experts by `speed`, lower that of over-used ones.

        counts [MoE layers, E]: tokens of the whole step, over all ranks (V3, sec. 2.1.2).
        """
        for router, row in zip(self.routers(), counts, strict=False):  # MTP's router has no row where MTP did not run
            load = row.to(router.e_score_correction_bias)
            router.e_score_correction_bias += speed * (load.mean() - load).sign()

    def init_weights(self, seed: int, share: Share | None = None) -> None:
        """N(0, initializer_range) for matrices, 1 for norm weights, 0 for biases; the same values however they are cut.
        What is on the meta device is made on the CPU in fp32; `share`: see `model/fill.py`."""
        with torch.device("meta"):
            whole = Transformer(self.config).state_dict()  # the shapes, whatever part of the model is here
        drawn = Drawn({name: value.shape for name, value in whole.items()}, seed, self.config.initializer_range)

        def write(name: str, values: Tensor, start: int, length: int) -> None:
            value = drawn(name).view(-1)
            before = self.first_expert * whole[name][0].numel() if ".experts." in name else 0
            values[start : start + length] = value[before + start :][:length]

        fill(self, torch.float32, write, share)

    @torch.no_grad()
    def init_indexer(self, seed: int) -> None:
        """A fresh indexer for a dense checkpoint: N(0, 0.02), k_norm 1/0 (the report's warm-up starts from random)."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.indexer_parameters():
            p.copy_(fresh(name, p.shape, generator, INDEXER_INIT))


class Drawn:
    """Untrained tensors of the names in `shapes`, asked for in that order: what is left out is drawn all the same, so
    that a part of a model starts from the values of the whole."""

    def __init__(self, shapes: Mapping[str, torch.Size], seed: int, std: float) -> None:
        self._rest, self._std = iter(shapes.items()), std
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, name: str) -> Tensor:
        for each, shape in self._rest:
            value = fresh(each, shape, self._generator, self._std)
            if each == name:
                return value
        raise KeyError(name)


def fresh(name: str, shape: torch.Size, generator: torch.Generator, std: float) -> Tensor:
    """What an untrained parameter or buffer starts from; matrices are drawn from the generator."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    return torch.randn(shape, generator=generator).mul_(std)
