"""Multi-head latent attention in its two forms, with the lightning indexer beside it (DeepSeek-V2 sec. 2.1, V3.2 sec.
2.1).

Dense attention runs decompressed (per-head keys [nope | rope]); sparse attention runs absorbed: queries are carried
into the latent space once and every selected token costs one shared row [c_kv | k_rope]. Both give the same result
when the selection holds every visible token.
The indexer's loss needs what attention makes (its own pass over dense attention, or the target of the sparse one), so
attention runs inside the indexer's call there (`model/indexer.py` says why).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from conf.schema import ModelConfig
from model.context import Context
from model.indexer import Indexed, LightningIndexer
from model.layers import Linear, RMSNorm, linear
from model.ops.common import IndexKL, compute_dtype, no_autocast, positions, short_lived
from model.ops.fp8_linear import fp8_round_weight
from model.ops.index_kl_dense import index_kl_dense
from model.ops.index_kl_selected import index_kl_selected
from model.ops.index_topk import index_topk
from model.ops.mla_dense import mla_dense
from model.ops.settings import DEFAULT
from model.ops.sparse_mla import SparseAttention, sparse_mla
from model.replay import LayerReplay, repeat, selection_overlap
from model.rope import rotate_interleaved, softmax_scale

LATENT_EPS = 1e-6  # of q_a and kv_a norms, whatever rms_norm_eps says


class KVUpProjection(nn.Module):
    """Owns W_UK and W_UV ([H * (nope + v), kv_lora_rank], interleaved by head) and applies them in either form.

    In FP8 the absorbed form multiplies by the rounded weight and leaves activations as they are: its products are
    attention's, which stays in higher precision (V3, sec. 3.3.1).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.nope, self.v = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
        self.weight = nn.Parameter(torch.empty(self.heads * (self.nope + self.v), config.kv_lora_rank))
        self.settings = DEFAULT

    def forward(self, x: Tensor | None, form: str) -> Tensor:
        """`expand`: latent [..., C] -> [..., H, nope + v]; `value`: latent output [..., H, C] -> [..., H, v];
        `key_weight`: W_UK itself [H, nope, C], for those who absorb queries in their own precision (x None)."""
        if form == "expand":
            assert x is not None
            return linear(x, self.weight, self.settings).unflatten(-1, (self.heads, self.nope + self.v))
        weight = self.weight if self.settings.fp8_linear is None else fp8_round_weight(self.weight, power_of_two=True)
        w_uk, w_uv = weight.view(self.heads, self.nope + self.v, -1).split([self.nope, self.v], 1)
        if form == "key_weight":
            return w_uk
        assert form == "value" and x is not None, form
        return torch.einsum("...hc,hvc->...hv", x, w_uv)


class Projected(NamedTuple):
    """MLA's projections of x [..., D]: q_nope [..., H, nope], q_rope [..., H, rope], latent [..., C], k_rope [...,
    rope], q_latent [..., q_lora_rank] (normalised; the indexer's input)."""

    q_nope: Tensor
    q_rope: Tensor
    latent: Tensor
    k_rope: Tensor
    q_latent: Tensor


class MLA(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.heads, self.topk = heads, config.index_topk
        self.nope, self.rope, self.v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.kv_lora_rank = config.kv_lora_rank
        self.scale = softmax_scale(config.rope, config.qk_head_dim)
        self.q_a_proj = Linear(hidden, config.q_lora_rank)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPS)
        self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(hidden, self.kv_lora_rank + self.rope)
        self.kv_a_layernorm = RMSNorm(self.kv_lora_rank, LATENT_EPS)
        self.kv_b_proj = KVUpProjection(config)
        self.o_proj = Linear(heads * self.v, hidden)
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
        replay: LayerReplay | None = None,
        row_topk: tuple[int, ...] = (),
    ) -> tuple[Tensor, IndexKL | None, Tensor | None]:
        """x [R, D] after the input norm, cos/sin [R, rope/2] -> ([R, D], indexer loss or None, `selection_overlap` [2]
        where sparse attention has a record).

        Of the rest of the sequence only latents, rope keys and index keys are asked for: queries stay where they are.
        """
        p = self.project(x, cos, sin)
        if attention == "dense":
            return *self._dense(x, p, cos, sin, context, indexer_loss, stats, row_topk), None
        return self._sparse(x, p, cos, sin, context, indexer_loss, stats, replay)

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
        row_topk: tuple[int, ...],
    ) -> tuple[Tensor, IndexKL | None]:
        latent, k_rope = self._rows(p, context)
        k_nope, v = self.kv_b_proj(latent, "expand").split([self.nope, self.v], -1)
        q = torch.cat([p.q_nope, p.q_rope], -1)
        # rounded already, but widened beside the latents, which the norm leaves in fp32
        k_rope = k_rope.to(k_nope.dtype)
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

        def loss(index: Indexed, _: bool) -> IndexKL:
            values, topk = v if shared else None, self.topk if stats else None
            found, kl = index_kl_dense(
                q,
                k,
                values,
                self.scale,
                index.q,
                context.gather(index.k),
                index.w,
                rows[0],
                topk,
                rows[1],
                self.settings,
                row_topk=row_topk,
            )
            attended.append(found)
            return kl

        kl = self.indexer(x, p.q_latent, cos, sin, loss)
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
        replay: LayerReplay | None,
    ) -> tuple[Tensor, IndexKL | None, Tensor | None]:
        attended: list[SparseAttention] = []
        overlap: list[Tensor] = []

        def attend(index: Indexed, grad: bool) -> Tensor:
            """The selection, [R, k]; `grad`: whether the trunk learns from what is attended to."""
            idx = index_topk(
                index.q, index.k, index.w, context.doc_start, self.topk, q_pos=context.q_pos, settings=self.settings
            )
            if replay is not None and replay.selected is not None:
                visible = positions(context.doc_start, context.q_pos) - context.doc_start + 1
                overlap.append(selection_overlap(idx, replay.selected, visible))
                idx = repeat(idx, replay.selected, replay.keep_selection)
            with torch.set_grad_enabled(grad):
                w_uk, rows = self.kv_b_proj(None, "key_weight"), self._rows(p, context)
                learns = indexer_loss is not None
                attended.append(
                    sparse_mla(p.q_nope, p.q_rope, w_uk, *rows, idx, self.scale, learns, settings=self.settings)
                )
            return idx

        def loss(index: Indexed, grad: bool) -> IndexKL:
            index = index._replace(k=context.gather(index.k))
            idx = attend(index, grad)
            target = attended[0].target
            assert target is not None
            with short_lived():
                return index_kl_selected(target, idx, *index, stats, settings=self.settings)

        if indexer_loss is None:
            index = self.indexer(x, p.q_latent, cos, sin)
            attend(index._replace(k=context.gather(index.k)), torch.is_grad_enabled())
            kl = None
        else:
            assert indexer_loss == "selected", indexer_loss
            kl = self.indexer(x, p.q_latent, cos, sin, loss)
        return self.output(attended[0].out.to(x.dtype)), kl, overlap[0] if overlap else None
