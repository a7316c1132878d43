"""The lightning indexer (DeepSeek-V3.2, sec. 2.1): a small multi-head scorer that chooses which tokens attention reads.

    I[t, s] = sum_h w[t, h] relu(q[t, h] . k[s])      q from the normalised q latent, one key k shared by all heads

What is easy to get wrong, and silent while T <= topk: head layout is [rope, nope] (MLA's is [nope, rope]), RoPE is
half-split, k_norm is a LayerNorm with bias and eps 1e-6, the head weights stay in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.schema import ModelConfig
from model.ops.common import no_autocast
from model.rope import rotate_half_split


class LightningIndexer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.dim, self.rope_dim = config.index_n_heads, config.index_head_dim, config.qk_rope_head_dim
        self.wq_b = nn.Linear(config.q_lora_rank, self.heads * self.dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.dim, bias=False)
        self.k_norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False)

    def forward(self, x: Tensor, q_latent: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., D] (after the input norm), q_latent [..., q_lora_rank], cos/sin [..., rope/2].

        Returns q [..., Hi, di] and k [..., di] in the dtype that the projections run in (norm and RoPE are fp32), and
        fp32 w [..., Hi] with both scales (Hi^-0.5, di^-0.5) folded in.
        """
        query, key = self.wq_b(q_latent).unflatten(-1, (self.heads, self.dim)), self.wk(x)
        with no_autocast(x):
            q = self._rotate(query.float(), cos, sin).to(query.dtype)
            k = self._rotate(self.k_norm(key.float()), cos, sin).to(key.dtype)
            # parameter and product stay in fp32, whatever the rest of the model runs in
            w = F.linear(x.float(), self.weights_proj.weight.float()) * (self.heads**-0.5 * self.dim**-0.5)
        return q, k, w

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rope, nope = x.split([self.rope_dim, self.dim - self.rope_dim], -1)
        return torch.cat([rotate_half_split(rope, cos, sin), nope], -1)
