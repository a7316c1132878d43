"""The small parts: linears that can run in FP8, RMSNorm, the gated MLP, and the output head that never makes [T, V].

In FP8 (V3, sec. 3.3.1) run the linears that DeepSeek stores in FP8: MLA's projections, the indexer's wq_b and wk, MLP
and experts. Embedding, head, norms, router, weights_proj and eh_proj do not. Scales are powers of two as in V3.1 and
V3.2, so the weight that training multiplies by is the one that an FP8 export stores (but for blocks with no entry above
1e-4, whose stored scale has a floor).
Norm and gate have their own backward, which recomputes what plain autograd would keep.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.ops.common import compute_dtype
from model.ops.fp8_linear import fp8_linear
from model.ops.settings import DEFAULT, OpSettings
from model.ops.vocab_loss import KeptSets, token_logprobs


def linear(x: Tensor, weight: Tensor, settings: OpSettings) -> Tensor:
    """x [..., K] @ weight [N, K]^T, in FP8 where the settings say so."""
    if settings.fp8_linear is None:
        return F.linear(x, weight)
    return fp8_linear(x, weight, power_of_two=True, backend=settings.fp8_linear)


class Linear(nn.Linear):
    """Without bias; one that DeepSeek stores in FP8."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.settings = DEFAULT  # the owner of the model sets another: Transformer.use

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.settings)


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one number a row, not the normalised rows."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(compute_dtype(x))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, d_out: Tensor):
        x, weight, scale = ctx.saved_tensors
        normal = x.to(scale.dtype) * scale
        d_x = d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (d_out * normal.to(x.dtype)).view(-1, len(weight)).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            d_normal = (d_out * weight).to(scale.dtype)
            d_x = (scale * (d_normal - normal * (d_normal * normal).mean(-1, keepdim=True))).to(x.dtype)
        return d_x, d_weight, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, which keeps its inputs alone."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, d_out: Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(d_out * up, gate), d_out * F.silu(gate)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _SwiGLU.apply(gate, up)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square taken in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class LMHead(nn.Module):
    """Owns the output matrix; its parameter is read inside this forward alone."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        temperature: float = 1.0,
        kept: KeptSets | None = None,
    ) -> Tensor:
        """hidden [T, D] with labels [T] -> log p(label) [T] (0 where -100), at a temperature and over the words `kept`;
        without labels -> logits [T, V] fp32."""
        if labels is None:
            return F.linear(hidden, self.weight).float()
        return token_logprobs(hidden, self.weight, labels, temperature=temperature, kept=kept)
