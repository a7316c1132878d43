"""What a forward keeps for its backward, tensor by tensor, from the configuration alone.

tests/train/test_activations.py holds every sum against torch's own hook on saved tensors, with plain torch on a CPU, to
the last byte. Notation: R rows that this rank computes, S keys of the whole sequence (R x cp), K experts a token,
N = R K rows of experts (where ranks share experts: on the average), b bytes of a value where autocast reaches (4, under
bf16 and fp8 2). Residual stream, norms' outputs, router, latents and gathers stay in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import ModelConfig
from train.stages import Stage

FP32, INT32, INT64 = 4, 4, 8
WIDTH = {"fp32": 4, "bf16": 2, "fp8": 2}  # b


@dataclass(frozen=True)
class Shape:
    """One forward of this rank: `rows` of a sequence of `keys`; `experts` that it holds of each layer; `fused`: Triton
    kernels run (a GPU), else plain torch."""

    model: ModelConfig
    stage: Stage
    precision: str
    rows: int
    keys: int
    experts: int
    fused: bool = False

    @property
    def b(self) -> int:
        return WIDTH[self.precision]

    @property
    def narrow(self) -> bool:
        """Whether linears keep narrow copies of their input, one each, and of their weight (FP8's of the input)."""
        return self.b < FP32

    @property
    def trunk(self) -> bool:
        """Whether the trunk's forward is recorded."""
        return self.stage.trunk_grad and self.stage.trains_trunk

    @property
    def expert_rows(self) -> int:
        return self.rows * self.model.num_experts_per_tok


Kept = dict[str, int]  # kind -> bytes: activations | indexer | weight_copies


def norm(rows: int, width: int, itemsize: int) -> int:
    """RMSNorm keeps its input and one number a row."""
    return rows * (width * itemsize + FP32)


def inputs(shape: Shape, width: int, products: int) -> int:
    """The fp32 input of `products` linears side by side: shared, or a narrow copy each."""
    return shape.rows * width * (products * shape.b if shape.narrow else FP32)


def attention(shape: Shape, itemsize: int = FP32) -> Kept:
    """MLA of one layer with its input norm, whose input has `itemsize` bytes a value."""
    model, rows, keys, b = shape.model, shape.rows, shape.keys, shape.b
    heads, hidden, query, latent = (
        model.num_attention_heads, model.hidden_size, model.q_lora_rank, model.kv_lora_rank,
    )  # fmt: skip
    rope, value = model.qk_rope_head_dim, model.v_head_dim
    found: Kept = {}
    kept = norm(rows, hidden, itemsize) + inputs(shape, hidden, 2) + norm(rows, query, b) + inputs(shape, query, 1)
    # the latents' norm keeps a view of the projection's rows, rope keys and all
    kept += rows * ((latent + rope) * b + FP32)
    if shape.stage.attention == "sparse":
        out = heads * latent
        kept += rows * heads * (model.qk_head_dim + rope) * b  # decompressed queries, their rotated part apart
        kept += keys * (latent + rope) * FP32 + rows * (out * (b if shape.fused else FP32) + heads * FP32)
        found["indexer"] = rows * model.index_topk * INT32
        if shape.narrow:  # the value product's operands
            kept += rows * out * b
            found["weight_copies"] = heads * value * latent * b
        if shape.precision == "fp8":  # W_UK as rounded, in one tensor with W_UV, in whole blocks
            found["weight_copies"] += _blocks(heads * (model.qk_nope_head_dim + value)) * _blocks(latent) * FP32
    else:
        width = max(model.qk_head_dim, value)
        kept += keys * (latent * b if shape.narrow else (latent + rope) * FP32)  # in one tensor with the rope keys
        kept += heads * width * b * (2 * rows + 2 * keys) + rows * heads * FP32  # q and out, k and v; log-sum-exp
    kept += rows * heads * value * b  # o_proj's input
    return found | {"activations": kept}


def _blocks(size: int) -> int:
    """A multiple of FP8's block of 128."""
    return -(-size // 128) * 128


def weight_copies(shape: Shape, moe: bool) -> int:
    """Under autocast: what products keep of one layer's weights."""
    if shape.precision != "bf16":
        return 0
    model = shape.model
    heads, hidden = model.num_attention_heads, model.hidden_size
    count = hidden * (model.q_lora_rank + model.kv_lora_rank + model.qk_rope_head_dim)
    count += heads * (model.q_lora_rank * model.qk_head_dim + model.v_head_dim * hidden)
    if shape.stage.attention == "dense":
        count += heads * (model.qk_nope_head_dim + model.v_head_dim) * model.kv_lora_rank
    if moe:
        count += 3 * hidden * model.moe_intermediate_size * (shape.experts + model.n_shared_experts)
    else:
        count += 3 * hidden * model.intermediate_size
    return count * shape.b


def mlp(shape: Shape, inner: int) -> int:
    """Gated MLP without its norm: the input of two products, gate, up, and the input of the last."""
    return inputs(shape, shape.model.hidden_size, 2) + 3 * shape.rows * inner * shape.b


def moe(shape: Shape) -> int:
    """Router, experts and shared expert without the norm."""
    model, rows, n, b = shape.model, shape.rows, shape.expert_rows, shape.b
    hidden, inner, experts = model.hidden_size, model.moe_intermediate_size, model.n_routed_experts
    shared = mlp(shape, inner * model.n_shared_experts)
    if not shape.narrow:
        shared -= rows * hidden * FP32  # the router keeps the same rows
    router = rows * hidden * FP32 + rows * experts * FP32 + n * INT64
    router += (n + rows) * FP32 if model.norm_topk_prob else 0
    routed = n * hidden * (2 * b if shape.narrow else FP32) + 3 * n * inner * b
    routed += FP32 + (0 if shape.precision == "fp8" else 3 * shape.experts * INT32)
    combined = n * (2 * hidden * FP32 + FP32 + 2 * INT64)  # experts' rows in fp32 before and behind the gates
    sent = n * INT64
    balance = rows * (2 * experts * FP32 + FP32)
    return router + shared + routed + combined + sent + balance


def ready_gradients(shape: Shape) -> int:
    """The indexer's own gradients of one layer, made in the forward."""
    model = shape.model
    if not shape.stage.trains_indexer or shape.stage.indexer_loss is None:
        return 0
    count = model.index_head_dim * (model.index_n_heads * model.q_lora_rank + model.hidden_size + 2)
    return FP32 * (count + model.index_n_heads * model.hidden_size)


def layer(shape: Shape, is_moe: bool, itemsize: int = FP32) -> Kept:
    """All that one layer keeps, its input included."""
    if not shape.trunk:
        return {"indexer": ready_gradients(shape)}
    model = shape.model
    found = attention(shape, itemsize)
    own = norm(shape.rows, model.hidden_size, itemsize) + (
        moe(shape) if is_moe else mlp(shape, model.intermediate_size)
    )
    return {
        "activations": found["activations"] + own,
        "indexer": found.get("indexer", 0) + ready_gradients(shape),
        "weight_copies": found.get("weight_copies", 0) + weight_copies(shape, is_moe),
    }


def head(shape: Shape) -> int:
    """Final norm and head, of the trunk or of one MTP module: both inputs, and three numbers a target."""
    rows, hidden = shape.rows, shape.model.hidden_size
    if not shape.trunk or not shape.stage.lm_loss:
        return 0
    return norm(rows, hidden, FP32) + rows * (hidden * FP32 + 2 * INT64 + FP32)


def shared(shape: Shape) -> int:
    """Once for all layers: cosines and sines, ids of the embedding, which rows are no padding."""
    model = shape.model
    is_moe = model.first_k_dense_replace < model.num_hidden_layers or model.num_mtp_layers > 0
    mask = shape.rows if is_moe else 0
    return shape.rows * (shape.model.qk_rope_head_dim * FP32 + INT64) + mask if shape.trunk else 0


def mtp_entry(shape: Shape) -> Kept:
    """An MTP module before its layer: norms of the trunk's state (which the head keeps already) and of the next
    token's embedding, and the product of both."""
    if not shape.trunk:
        return {}
    rows, hidden = shape.rows, shape.model.hidden_size
    kept = norm(rows, hidden, FP32) + rows * FP32 + rows * INT64 + 2 * rows * hidden * shape.b
    return {"activations": kept, "weight_copies": 2 * hidden * hidden * shape.b if shape.narrow else 0}
