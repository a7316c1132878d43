"""The attention layer against an independent fp64 reference and against transformers, at T > index_topk.

Every check that passes here for the published indexer must fail for each known mistake (the negative controls).
"""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from conf.schema import ModelConfig, RopeConfig
from model.context import Context
from model.mla import MLA
from model.ops.index_topk import index_topk
from model.ops.index_topk.reference import index_scores
from model.ops.settings import OpSettings
from model.rope import rope_table
from tests.model.ops.cases import make_doc_start
from tests.model.reference_layer import IndexerVariant, LayerResult, attention_layer, mla_scale

YARN = RopeConfig(factor=40.0, original_max_position_embeddings=64, beta_fast=4.0, mscale_all_dim=0.7)
PLAIN = RopeConfig()
LENGTHS, PADDING = (61, 1, 35), 3  # the documents longer than index_topk make the selection bind
SCORE_TOLERANCE = 2e-5  # fp32 against fp64, of the largest score
OUTPUT_TOLERANCE = 2e-5

MISTAKES = {
    "interleaved_rope": IndexerVariant(rope="interleaved"),
    "nope_first": IndexerVariant(rope_first=False),
    "k_norm_eps": IndexerVariant(k_norm_eps=1e-5),
    "rms_k_norm": IndexerVariant(k_norm="rms"),
    "no_relu": IndexerVariant(relu=False),
    "mla_scale": IndexerVariant(scale="mla"),
    "no_scale": IndexerVariant(scale="none"),
}
# A constant factor moves no selection: it shows in the scores, and so in the KL.
MISTAKES_IN_SCORES_ONLY = {"mla_scale", "no_scale"}


def make_config(rope: RopeConfig = YARN, index_heads: int = 16, topk: int = 12) -> ModelConfig:
    return ModelConfig(
        hidden_size=48,
        num_attention_heads=4,
        q_lora_rank=40,
        kv_lora_rank=24,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        index_n_heads=index_heads,
        index_head_dim=32,
        index_topk=topk,
        rope=rope,
        max_position_embeddings=int(rope.factor * rope.original_max_position_embeddings),
    )


BACKENDS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(find_spec("triton") is None, reason="the kernels need triton")),
]


def make_layer(config: ModelConfig, seed: int = 0, backend: str = "torch") -> MLA:
    """Random weights of unit gain; index keys of variance near 1e-6, so that k_norm's eps matters, and a k_norm that is
    not the identity."""
    layer = MLA(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(noise * 0.2 + (0.0 if name.endswith("bias") else 1.0))
        layer.indexer.wk.weight.mul_(2e-3)
    layer.settings = OpSettings(backend)
    return layer


def make_inputs(config: ModelConfig, doc_start: Tensor, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, D] with rows of different size (so that eps acts differently on each), cos and sin [T, rope/2]."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(doc_start)
    x = torch.randn(rows, config.hidden_size, generator=generator)
    x = x * torch.rand(rows, 1, generator=generator).add(0.2)
    positions = (torch.arange(rows) - doc_start).clamp(min=0)
    return x, *rope_table(config.rope, config.qk_rope_head_dim, positions)


def model_scores(layer: MLA, x: Tensor, cos: Tensor, sin: Tensor, doc_start: Tensor) -> tuple[Tensor, list[list[int]]]:
    """The model's own scores [T, T] and selected sets."""
    with torch.no_grad():
        q, k, w = layer.indexer(x, layer.project(x, cos, sin).q_latent, cos, sin)
    chosen = index_topk(q, k, w, doc_start, layer.topk, settings=layer.settings)
    return index_scores(q, k, w), [[s for s in row if s >= 0] for row in chosen.tolist()]


def score_error(scores: Tensor, expected: LayerResult) -> float:
    """Largest difference over the visible pairs, of the largest score."""
    seen = expected.scores.isfinite()
    difference = (scores.double()[seen] - expected.scores[seen]).abs().max()
    return (difference / expected.scores[seen].abs().max()).item()


def border_gap(scores: Tensor, topk: int) -> float:
    """Smallest relative gap between the last score taken and the first one left: what rounding may not cross."""
    ranked = scores.sort(dim=-1, descending=True).values
    binding = ranked[:, topk].isfinite()
    gaps = (ranked[binding, topk - 1] - ranked[binding, topk]) / ranked[binding].abs().nan_to_num(posinf=0.0).amax(1)
    return gaps.min().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rope", [YARN, PLAIN], ids=["yarn", "plain"])
def test_indexer_equals_the_reference(rope, backend):
    config, doc_start = make_config(rope), make_doc_start(LENGTHS, PADDING)
    layer = make_layer(config, backend=backend)
    x, cos, sin = make_inputs(config, doc_start)
    expected = attention_layer(layer.state_dict(), config, x, doc_start)
    scores, chosen = model_scores(layer, x, cos, sin, doc_start)
    assert border_gap(expected.scores, config.index_topk) > 1e-6
    assert score_error(scores, expected) < SCORE_TOLERANCE
    assert chosen == expected.chosen


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name):
    config, doc_start = make_config(), make_doc_start(LENGTHS, PADDING)
    layer = make_layer(config)
    x, cos, sin = make_inputs(config, doc_start)
    wrong = attention_layer(layer.state_dict(), config, x, doc_start, variant=MISTAKES[name])
    scores, chosen = model_scores(layer, x, cos, sin, doc_start)
    assert score_error(scores, wrong) > 1000 * SCORE_TOLERANCE
    assert (chosen == wrong.chosen) == (name in MISTAKES_IN_SCORES_ONLY)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_silent_while_everything_is_selected(name):
    """Why the tests above need T > index_topk: below it no output moves."""
    config, doc_start = make_config(topk=64), make_doc_start(LENGTHS, PADDING)
    layer = make_layer(config)
    x, _, _ = make_inputs(config, doc_start)
    right, wrong = (
        attention_layer(layer.state_dict(), config, x, doc_start, variant=v) for v in (IndexerVariant(), MISTAKES[name])
    )
    assert torch.equal(right.out, wrong.out)


def test_the_hadamard_transform_changes_nothing():
    config, doc_start = make_config(), make_doc_start(LENGTHS, PADDING)
    layer = make_layer(config)
    x, _, _ = make_inputs(config, doc_start)
    plain = attention_layer(layer.state_dict(), config, x, doc_start)
    turned = attention_layer(layer.state_dict(), config, x, doc_start, variant=IndexerVariant(hadamard=True))
    assert score_error(turned.scores, plain) < 1e-12
    assert turned.chosen == plain.chosen


@pytest.mark.parametrize("rope", [YARN, PLAIN], ids=["yarn", "plain"])
@pytest.mark.parametrize("attention", ["sparse", "dense"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_equals_the_reference(backend, attention, rope):
    config, doc_start = make_config(rope), make_doc_start(LENGTHS, PADDING)
    layer = make_layer(config, backend=backend)
    x, cos, sin = make_inputs(config, doc_start)
    expected = attention_layer(layer.state_dict(), config, x, doc_start, sparse=attention == "sparse").out
    with torch.no_grad():
        out, *_ = layer(x, cos, sin, Context.whole(doc_start), attention, None, False)
    assert (out - expected).abs().max() < OUTPUT_TOLERANCE * expected.abs().max()
    other = attention_layer(layer.state_dict(), config, x, doc_start, sparse=attention != "sparse").out
    assert (out - other).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_equals_sparse_when_topk_covers_the_sequence(backend):
    """Forward, and gradients of the input and of the trunk's parameters, through the absorbed up-projections."""
    doc_start = make_doc_start(LENGTHS, PADDING)
    layer = make_layer(make_config(topk=len(doc_start)), backend=backend)
    x, cos, sin = make_inputs(make_config(), doc_start)
    x.requires_grad_()
    trunk = {name: p for name, p in layer.named_parameters() if not name.startswith("indexer.")}
    outputs, gradients = [], []
    for attention in ("dense", "sparse"):
        out, *_ = layer(x, cos, sin, Context.whole(doc_start), attention, None, False)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        outputs.append(out.detach())
        gradients.append(torch.autograd.grad((out * upstream).sum(), [x, *trunk.values()]))
    assert (outputs[0] - outputs[1]).abs().max() < OUTPUT_TOLERANCE * outputs[0].abs().max()
    for name, dense, sparse in zip(["x", *trunk], *gradients, strict=True):
        assert dense.abs().max() > 0, name
        assert (dense - sparse).abs().max() < 5 * OUTPUT_TOLERANCE * dense.abs().max(), name


# --- transformers as a second opinion ---


class Selection(TorchFunctionMode):
    """Records the scores that transformers' indexer ranks; `stable` ranks them with ties to the lowest index."""

    def __init__(self, stable: bool = False) -> None:
        super().__init__()
        self.stable = stable
        self.scores: Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.topk:
            self.scores = args[0].detach()[0]
            if self.stable:
                ranked = args[0].sort(dim=-1, descending=True, stable=True)
                return torch.return_types.topk((ranked.values[..., : args[1]], ranked.indices[..., : args[1]]))
        return func(*args, **(kwargs or {}))


def make_oracle(config: ModelConfig, layer: MLA):
    modeling = pytest.importorskip("transformers.models.deepseek_v32.modeling_deepseek_v32")
    names = {field.name for field in dataclasses.fields(config)} - {"rope", "mtp", "num_nextn_predict_layers"}
    rope = dataclasses.asdict(config.rope)
    parameters = {
        "rope_type": "default" if config.rope.factor == 1 else "yarn",
        "rope_theta": rope.pop("theta"),
        **rope,
    }
    theirs = modeling.DeepseekV32Config(
        **{name: value for name, value in dataclasses.asdict(config).items() if name in names},
        num_key_value_heads=config.num_attention_heads,
        rope_parameters=parameters,
    )
    theirs._attn_implementation = "eager"
    attention = modeling.DeepseekV32Attention(theirs, 0)
    attention.load_state_dict(layer.state_dict())
    return attention, modeling.DeepseekV32RotaryEmbedding(theirs)


def run_oracle(config: ModelConfig, layer: MLA, x: Tensor, doc_start: Tensor, stable: bool = False):
    """Their output [T, D], scores [T, T] and selected sets; documents are kept apart by positions and mask."""
    attention, rotary = make_oracle(config, layer)
    position = torch.arange(len(doc_start))
    seen = (position[None] >= doc_start[:, None]) & (position[None] <= position[:, None])
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    ranks = Selection(stable)
    with torch.no_grad():
        table = rotary(x[None], (position - doc_start).clamp(min=0)[None])
        q_latent = attention.q_a_layernorm(attention.q_a_proj(x[None]))
        with ranks:
            indices = attention.indexer(x[None], q_latent, table, mask[:, 0], None)[0]
            out, _ = attention(x[None], table, mask)
    chosen = [sorted(s for s in row if seen[t, s]) for t, row in enumerate(indices.tolist())]
    return out[0], ranks.scores, chosen


@pytest.mark.parametrize("rope", [YARN, PLAIN], ids=["yarn", "plain"])
def test_transformers_agrees(rope):
    """With 16 index heads no tie falls on the border (asserted), so their unstable top-k selects the same sets."""
    config, doc_start = make_config(rope), make_doc_start(LENGTHS)
    layer = make_layer(config)
    x, cos, sin = make_inputs(config, doc_start)
    expected = attention_layer(layer.state_dict(), config, x, doc_start)
    assert border_gap(expected.scores, config.index_topk) > 1e-6
    out, scores, chosen = run_oracle(config, layer, x, doc_start)
    assert score_error(scores, expected) < SCORE_TOLERANCE
    assert chosen == expected.chosen == model_scores(layer, x, cos, sin, doc_start)[1]
    assert (out - expected.out).abs().max() < OUTPUT_TOLERANCE * expected.out.abs().max()
    with torch.no_grad():
        mine, *_ = layer(x, cos, sin, Context.whole(doc_start), "sparse", None, False)
    assert (out - mine).abs().max() < OUTPUT_TOLERANCE * expected.out.abs().max()


def test_transformers_agrees_with_ties_once_it_ranks_stably():
    """Four index heads: relu leaves exact zeros on the border of some rows, and the lowest positions are taken."""
    config, doc_start = make_config(index_heads=4, topk=40), make_doc_start((97,))
    layer = make_layer(config)
    x, cos, sin = make_inputs(config, doc_start)
    expected = attention_layer(layer.state_dict(), config, x, doc_start)
    assert border_gap(expected.scores, config.index_topk) == 0.0
    _, scores, chosen = run_oracle(config, layer, x, doc_start, stable=True)
    assert score_error(scores, expected) < SCORE_TOLERANCE
    assert chosen == expected.chosen == model_scores(layer, x, cos, sin, doc_start)[1]


def test_mla_scale_differs_from_the_indexers():
    """Or the negative control would prove nothing."""
    config = make_config()
    assert abs(mla_scale(config) / config.index_head_dim**-0.5 - 1) > 0.1
