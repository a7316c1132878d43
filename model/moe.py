"""DeepSeekMoE with auxiliary-loss-free balancing (DeepSeek-V3, sec. 2.1.2).

Scores are sigmoids; a bias that no gradient touches steers only the *choice* of experts, the gate values come from the
bare scores. The MoE hands tokens to a `TokenDispatcher`, so expert parallelism is another dispatcher, not a branch
here.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.schema import ModelConfig
from model.context import Context
from model.layers import MLP, swiglu
from model.ops.common import no_autocast
from model.ops.fp8_linear import fp8_grouped_linear
from model.ops.settings import DEFAULT
from model.replay import LayerReplay, repeat, routes_agree


class Routing(NamedTuple):
    """experts [T, K] int64, gates [T, K] fp32, the full sigmoid scores [T, E] fp32, and the router's own choice [T, K],
    which `experts` is too unless another was repeated."""

    experts: Tensor
    gates: Tensor
    scores: Tensor
    live: Tensor


class Router(nn.Module):
    """Group-limited top-k choice (V3, eq. 12-16); parameter, product and bias stay in fp32."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))
        self.top_k, self.groups, self.top_groups = config.num_experts_per_tok, config.n_group, config.topk_group
        self.normalise, self.factor = config.norm_topk_prob, config.routed_scaling_factor

    def forward(self, x: Tensor, replay: LayerReplay | None = None) -> Routing:
        """x [T, D] -> Routing."""
        with no_autocast(x):
            scores = F.linear(x.float(), self.weight.float()).sigmoid()
            with torch.no_grad():
                live = experts = self._choose(scores + self.e_score_correction_bias)
                if replay is not None:
                    experts = repeat(live, replay.experts, replay.keep_routing)
            gates = scores.gather(1, experts)
            if self.normalise:
                gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts, gates * self.factor, scores, live)

    def _choose(self, biased: Tensor) -> Tensor:
        if self.groups > 1:
            grouped = biased.view(biased.shape[0], self.groups, -1)
            group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            kept = torch.zeros_like(group_scores, dtype=torch.bool)
            kept.scatter_(1, group_scores.topk(self.top_groups, dim=-1).indices, True)
            biased = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(1)
        return biased.topk(self.top_k, dim=-1).indices


class Experts(nn.Module):
    """Routed experts as 3-D tensors: w1 (gate) and w3 (up) [E, I, D], w2 (down) [E, D, I]; all of the layer's, or from
    number `first` on those that this process holds (train/parallel/ep.py)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.first = 0
        num, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.w1 = nn.Parameter(torch.empty(num, inner, hidden))
        self.w2 = nn.Parameter(torch.empty(num, hidden, inner))
        self.w3 = nn.Parameter(torch.empty(num, inner, hidden))
        self.settings = DEFAULT  # the owner of the model sets another: Transformer.use

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [N, D] sorted by expert, counts [E] int64: rows of each -> [N, D]."""
        backend = self.settings.fp8_linear
        sizes = [] if backend is None else counts.tolist()

        def product(x: Tensor, weight: Tensor) -> Tensor:
            if backend is not None:
                return fp8_grouped_linear(x, sizes, weight, power_of_two=True, backend=backend)
            return grouped_linear(x, counts, weight)

        return product(swiglu(product(x, self.w1), product(x, self.w3)), self.w2)


def grouped_linear(x: Tensor, counts: Tensor, weight: Tensor) -> Tensor:
    """x [N, K] sorted by expert, counts [E] rows of each, weight [E, M, K] -> [N, M]: every expert's x @ weight^T.

    torch's grouped product, which wants fp32 or bf16 and rows of whole 16 bytes; otherwise one product an expert.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    aligned = all(size * x.itemsize % 16 == 0 for size in weight.shape[1:])
    if x.dtype not in (torch.float32, torch.bfloat16) or x.dtype != weight.dtype or not aligned or not len(x):
        # unbind, not indexing: its backward stacks the slices once instead of adding E full-size tensors
        pairs = zip(x.split(counts.tolist()), weight.unbind(), strict=True)
        return torch.cat([F.linear(part, each) for part, each in pairs])
    out = F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))
    if out.requires_grad:
        out.register_hook(Tensor.contiguous)  # its backward refuses expanded gradients
    return out


class TokenDispatcher(Protocol):
    """Carries tokens to their experts and back: x [T, D], routing -> sum over K of gate * expert(x), [T, D]."""

    def __call__(self, x: Tensor, routing: Routing, experts: nn.Module, num_experts: int) -> Tensor: ...


def local_dispatch(x: Tensor, routing: Routing, experts: nn.Module, num_experts: int) -> Tensor:
    """Every expert is here. No capacity, so no token is ever dropped."""
    order, counts = sort_by_expert(routing, num_experts)
    out = experts(x.index_select(0, order // routing.experts.shape[1]), counts)
    return combine(x, routing, order, out)


def sort_by_expert(routing: Routing, num_experts: int) -> tuple[Tensor, Tensor]:
    """(the T * K choices, numbered t * K + j, in the order of their experts; choices of each expert [E])."""
    flat = routing.experts.flatten()
    return flat.argsort(stable=True), torch.bincount(flat, minlength=num_experts)


def combine(x: Tensor, routing: Routing, order: Tensor, out: Tensor) -> Tensor:
    """Experts' rows `out` [T * K, D] in `order` -> each token's gated sum [T, D] in x's dtype."""
    gated = out.float() * routing.gates.flatten().index_select(0, order).unsqueeze(1)
    token = order // routing.experts.shape[1]
    return torch.zeros(x.shape, dtype=torch.float32, device=x.device).index_add(0, token, gated).to(x.dtype)


class MoE(nn.Module):
    def __init__(self, config: ModelConfig, dispatcher: TokenDispatcher = local_dispatch) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
        self.num_experts, self.dispatcher = config.n_routed_experts, dispatcher

    def mix(self, x: Tensor, replay: LayerReplay | None = None) -> tuple[Tensor, Routing]:
        """x [N, D] -> routed plus shared experts [N, D], without the training statistics (decoding calls this)."""
        routing = self.gate(x, replay)
        return self.dispatcher(x, routing, self.experts, self.num_experts) + self.shared_experts(x), routing

    def forward(
        self, x: Tensor, context: Context, replay: LayerReplay | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x [R, D] -> (out [R, D], tokens routed to each expert [E] int64, balance loss; 0 where no gradient is asked
        for; `routes_agree` [2] where there is a record). Padding is computed, not counted."""
        out, routing = self.mix(x, replay)
        counts = torch.bincount(routing.experts[context.real].flatten(), minlength=self.num_experts)
        balance = balance_loss(routing, context) if routing.scores.requires_grad else x.new_zeros(())
        recorded = None if replay is None else replay.experts
        return out, counts, balance, None if recorded is None else routes_agree(routing.live, recorded)


def balance_loss(routing: Routing, context: Context) -> Tensor:
    """These rows' part of the sequence-wise balance loss (V3, eq. 17-20) without its factor alpha, each document a
    sequence, mean over the sequence's real tokens.

    Per document: sum_i f_i P_i, f_i = E / (K n) * times expert i was chosen, P_i = mean normalised score of expert i.
    f has no gradient and P is a sum over rows, so the parts of all slices add up to the loss, and so do their
    gradients: only the counts in f travel.
    """
    num_experts, top_k = routing.scores.shape[1], routing.experts.shape[1]
    real, lengths = context.real, context.lengths.unsqueeze(1)
    document, share = context.document[real], routing.scores[real]
    chosen = torch.zeros(lengths.shape[0] * num_experts, device=share.device)
    place = document.unsqueeze(1) * num_experts + routing.experts[real]
    chosen = context.add(chosen.index_add_(0, place.flatten(), chosen.new_ones(place.numel())))
    frequency = chosen.view(-1, num_experts) * num_experts / (top_k * lengths.clamp(min=1))
    share = share / share.sum(-1, keepdim=True)
    return (frequency[document] * share).sum() / lengths.sum().clamp(min=1)
