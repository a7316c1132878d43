"""The lightning indexer (DeepSeek-V3.2, sec. 2.1): a small multi-head scorer that chooses which tokens attention reads.

    I[t, s] = sum_h w[t, h] relu(q[t, h] . k[s])      q from the normalised q latent, one key k shared by all heads

What is easy to get wrong, and silent while T <= topk: head layout is [rope, nope] (MLA's is [nope, rope]), RoPE is
half-split, k_norm is a LayerNorm with bias and eps 1e-6, the head weights stay in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.schema import ModelConfig
from model.layers import Linear, linear
from model.ops.common import IndexKL, no_autocast, short_lived, with_gradients
from model.ops.settings import DEFAULT
from model.rope import rotate_half_split


class Indexed(NamedTuple):
    """The indexer's q [..., Hi, di] and k [..., di], in the dtype that the projections run in, and scaled fp32 head
    weights w [..., Hi]."""

    q: Tensor
    k: Tensor
    w: Tensor


IndexerLoss = Callable[[Indexed, bool], IndexKL]  # the bool: whether the caller of the indexer records gradients


class LightningIndexer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.dim, self.rope_dim = config.index_n_heads, config.index_head_dim, config.qk_rope_head_dim
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.dim)
        self.wk = Linear(config.hidden_size, self.dim)
        self.k_norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False)
        self.settings = DEFAULT

    def forward(
        self, x: Tensor, q_latent: Tensor, cos: Tensor, sin: Tensor, loss: IndexerLoss | None = None
    ) -> Indexed | IndexKL:
        """x [..., D] (after the input norm), q_latent [..., q_lora_rank], cos/sin [..., rope/2] -> Indexed.

        Both are taken as constants. With `loss`, a function of Indexed, the loss comes back instead, its parameter
        gradients made at once and its graph dropped: the trunk may run under no_grad, and no activation of 61 layers is
        kept for the indexer. All of it happens within this one forward, while ZeRO-3 has the parameters together
        (`train/engine.py` registers them here); the parts are never called as modules, which would let them go.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        grad = torch.is_grad_enabled()
        with torch.set_grad_enabled(loss is not None and bool(parameters)):
            with short_lived():
                indexed = self.project(x.detach(), q_latent.detach(), cos, sin)
            if loss is None:
                return indexed
            found = loss(indexed, grad)
            if not parameters or not found.kl_sum.requires_grad:
                return found
            with no_autocast(x):  # a backward outside the forward has none either: it would narrow fp32 products
                gradients = torch.autograd.grad(found.kl_sum, parameters)
            return found._replace(kl_sum=with_gradients(found.kl_sum.detach(), parameters, gradients))

    def project(self, x: Tensor, q_latent: Tensor, cos: Tensor, sin: Tensor) -> Indexed:
        """Norm and RoPE are fp32, both scales (Hi^-0.5, di^-0.5) are folded into w."""
        query, key = linear(q_latent, self.wq_b.weight, self.settings), linear(x, self.wk.weight, self.settings)
        query = query.unflatten(-1, (self.heads, self.dim))
        with no_autocast(x):
            q = self._rotate(query.float(), cos, sin).to(query.dtype)
            norm = self.k_norm
            k = F.layer_norm(key.float(), norm.normalized_shape, norm.weight, norm.bias, norm.eps)
            k = self._rotate(k, cos, sin).to(key.dtype)
            # parameter and product stay in fp32, whatever the rest of the model runs in
            w = F.linear(x.float(), self.weights_proj.weight.float()) * (self.heads**-0.5 * self.dim**-0.5)
        return Indexed(q, k, w)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rope, nope = x.split([self.rope_dim, self.dim - self.rope_dim], -1)
        return torch.cat([rotate_half_split(rope, cos, sin), nope], -1)
