"""Multi-head latent attention in its two forms, with the lightning indexer beside it (DeepSeek-V2 sec. 2.1, V3.2 sec.
2.1).

Dense attention runs decompressed (per-head keys [nope | rope]); sparse attention runs absorbed: queries are carried
into the latent space once and every selected token costs one shared row [c_kv | k_rope]. Both give the same result
when the selection holds every visible token.
The indexer's inputs are detached, and its loss leaves here with ready-made parameter gradients (`local_loss`), so its
graph is gone before the next layer runs: the trunk may run under no_grad, and no activation of 61 layers is kept for
the indexer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from conf.schema import ModelConfig
from model.context import Context
from model.indexer import LightningIndexer
from model.layers import RMSNorm
from model.ops.common import IndexKL, compute_dtype, no_autocast, with_gradients
from model.ops.index_kl_dense import index_kl_dense
from model.ops.index_kl_selected import index_kl_selected
from model.ops.index_topk import index_topk
from model.ops.mla_dense import mla_dense
from model.ops.settings import DEFAULT
from model.ops.sparse_mla import sparse_mla
from model.rope import rotate_interleaved, softmax_scale

LATENT_EPS = 1e-6  # of q_a and kv_a norms, whatever rms_norm_eps says


class KVUpProjection(nn.Module):
    """Owns W_UK and W_UV ([H * (nope + v), kv_lora_rank], interleaved by head) and applies them in either form."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.nope, self.v = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
        self.weight = nn.Parameter(torch.empty(self.heads * (self.nope + self.v), config.kv_lora_rank))

    def forward(self, x: Tensor | None, form: str) -> Tensor:
        """`expand`: latent [..., C] -> [..., H, nope + v]; `value`: latent output [..., H, C] -> [..., H, v];
        `key_weight`: W_UK itself [H, nope, C], for those who absorb queries in their own precision (x None)."""
        w_uk, w_uv = self.weight.view(self.heads, self.nope + self.v, -1).split([self.nope, self.v], 1)
        if form == "key_weight":
            return w_uk
        assert x is not None
        if form == "expand":
            return nn.functional.linear(x, self.weight).unflatten(-1, (self.heads, self.nope + self.v))
        assert form == "value", form
        return torch.einsum("...hc,hvc->...hv", x, w_uv)


class Projected(NamedTuple):
    """MLA's projections of x [..., D]: q_nope [..., H, nope], q_rope [..., H, rope], latent [..., C], k_rope [...,
    rope], q_latent [..., q_lora_rank] (normalised; the indexer's input)."""

    q_nope: Tensor
    q_rope: Tensor
    latent: Tensor
    k_rope: Tensor
    q_latent: Tensor


class Indexed(NamedTuple):
    """The indexer's q [T, Hi, di], k [T, di] and scaled fp32 head weights w [T, Hi]."""

    q: Tensor
    k: Tensor
    w: Tensor


class MLA(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.heads, self.topk = heads, config.index_topk
        self.nope, self.rope, self.v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.kv_lora_rank = config.kv_lora_rank
        self.scale = softmax_scale(config.rope, config.qk_head_dim)
        self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPS)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.kv_lora_rank + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.kv_lora_rank, LATENT_EPS)
        self.kv_b_proj = KVUpProjection(config)
        self.o_proj = nn.Linear(heads * self.v, hidden, bias=False)
        self.indexer = LightningIndexer(config)
        self.settings = DEFAULT  # the owner of the model sets another: Transformer.use

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> Projected:
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(q_latent).unflatten(-1, (self.heads, self.nope + self.rope))
        q_nope, q_rope = q.split([self.nope, self.rope], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.kv_lora_rank, self.rope], -1)
        return Projected(
            q_nope,
            rotate_interleaved(q_rope, cos, sin),
            self.kv_a_layernorm(latent),
            rotate_interleaved(k_rope, cos, sin),
            q_latent,
        )

    def absorb(self, p: Projected) -> tuple[Tensor, Tensor]:
        """Queries [..., H, C + rope] in the latent space and the shared rows [..., C + rope], for decoding.

        In fp32 whatever autocast says, as sparse_mla absorbs: rounding here alone would set rollout and trainer apart.
        """
        dtype = compute_dtype(p.q_nope, p.latent)
        with no_autocast(p.latent):
            q = torch.einsum("...hn,hnc->...hc", p.q_nope.to(dtype), self.kv_b_proj(None, "key_weight").to(dtype))
            return torch.cat([q, p.q_rope.to(dtype)], -1), torch.cat([p.latent, p.k_rope], -1)

    def output(self, latent_out: Tensor) -> Tensor:
        """[..., H, C] attention output in the latent space -> [..., D]."""
        return self.o_proj(self.kv_b_proj(latent_out, "value").flatten(-2))

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        context: Context,
        attention: str,
        indexer_loss: str | None,
        stats: bool,
    ) -> tuple[Tensor, IndexKL | None]:
        """x [R, D] after the input norm, cos/sin [R, rope/2] -> ([R, D], indexer loss or None).

        Of the rest of the sequence only latents, rope keys and index keys are asked for: queries stay where they are.
        """
        p = self.project(x, cos, sin)
        form = self._dense if attention == "dense" else self._sparse
        return form(x, p, cos, sin, context, indexer_loss, stats)

    def _rows(self, p: Projected, context: Context) -> tuple[Tensor, Tensor]:
        """latent [T, C] and k_rope [T, rope] of the whole sequence."""
        rows = context.gather(torch.cat([p.latent, p.k_rope], -1))
        latent, k_rope = rows.split([self.kv_lora_rank, self.rope], -1)
        return latent, k_rope

    def _dense(
        self,
        x: Tensor,
        p: Projected,
        cos: Tensor,
        sin: Tensor,
        context: Context,
        indexer_loss: str | None,
        stats: bool,
    ) -> tuple[Tensor, IndexKL | None]:
        latent, k_rope = self._rows(p, context)
        k_nope, v = self.kv_b_proj(latent, "expand").split([self.nope, self.v], -1)
        q = torch.cat([p.q_nope, p.q_rope], -1)
        k = torch.cat([k_nope, k_rope.unsqueeze(-2).expand(-1, self.heads, -1)], -1)
        rows = (context.doc_start, context.q_pos)

        def attend() -> Tensor:
            return mla_dense(q, k, v, rows[0], self.scale, rows[1], self.settings)

        if indexer_loss is None:
            return self.o_proj(attend().flatten(-2)), None
        assert indexer_loss == "dense", indexer_loss
        # A trunk under no_grad takes its attention from the loss's own pass; a training one needs SDPA's backward.
        shared = not (torch.is_grad_enabled() and q.requires_grad)
        attended: list[Tensor | None] = []

        def loss(q_i: Tensor, k_i: Tensor, w: Tensor) -> IndexKL:
            values = v if shared else None
            topk = self.topk if stats else None
            found, kl = index_kl_dense(
                q, k, values, self.scale, q_i, context.gather(k_i), w, rows[0], topk, rows[1], self.settings
            )
            attended.append(found)
            return kl

        kl = self.local_loss(loss, self.index(x, p, cos, sin, graph=True))
        out = attended[0] if shared else attend()
        assert out is not None
        return self.o_proj(out.flatten(-2)), kl

    def _sparse(
        self,
        x: Tensor,
        p: Projected,
        cos: Tensor,
        sin: Tensor,
        context: Context,
        indexer_loss: str | None,
        stats: bool,
    ) -> tuple[Tensor, IndexKL | None]:
        learns = indexer_loss is not None
        index = self.index(x, p, cos, sin, graph=learns)
        k_index = context.gather(index.k)
        idx = index_topk(
            index.q, k_index, index.w, context.doc_start, self.topk, q_pos=context.q_pos, settings=self.settings
        )
        w_uk = self.kv_b_proj(None, "key_weight")
        rows = self._rows(p, context)
        attended = sparse_mla(p.q_nope, p.q_rope, w_uk, *rows, idx, self.scale, learns, settings=self.settings)
        out = self.output(attended.out.to(x.dtype))
        if indexer_loss is None:
            return out, None
        target = attended.target
        assert indexer_loss == "selected" and target is not None, indexer_loss

        def loss(q_i: Tensor, k_i: Tensor, w: Tensor) -> IndexKL:
            return index_kl_selected(target, idx, q_i, k_i, w, stats, settings=self.settings)

        return out, self.local_loss(loss, index._replace(k=k_index))

    def index(self, x: Tensor, p: Projected, cos: Tensor, sin: Tensor, graph: bool) -> Indexed:
        """The indexer on detached inputs; `graph` keeps the way to its parameters, for `local_loss`."""
        trains = any(parameter.requires_grad for parameter in self.indexer.parameters())
        with torch.set_grad_enabled(graph and trains):
            return Indexed(*self.indexer(x.detach(), p.q_latent.detach(), cos, sin))

    def local_loss(self, loss: Callable[[Tensor, Tensor, Tensor], IndexKL], index: Indexed) -> IndexKL:
        """The indexer's loss, its parameter gradients made at once and its graph dropped."""
        parameters = [p for p in self.indexer.parameters() if p.requires_grad]
        with torch.set_grad_enabled(bool(parameters)):
            found = loss(*index)
            if not parameters or not found.kl_sum.requires_grad:
                return found
            gradients = torch.autograd.grad(found.kl_sum, parameters)
            found.kl_sum = with_gradients(found.kl_sum.detach(), parameters, gradients)
        return found
