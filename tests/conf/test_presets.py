"""The architectures that ship: sizes as stated, DeepSeek-V3.2 number by number."""

from __future__ import annotations

import pytest

from conf.load import GROUPS, load, presets
from conf.schema import ModelConfig, RopeConfig
from conf.validate import violations


def preset(name: str) -> ModelConfig:
    return load(["+stage=pretrain", f"model={name}"]).config.model


def indexer_parameters(m: ModelConfig) -> int:
    """wq_b, wk, k_norm (weight and bias) and weights_proj of one layer."""
    queries = m.q_lora_rank * m.index_n_heads * m.index_head_dim
    return queries + m.hidden_size * m.index_head_dim + 2 * m.index_head_dim + m.hidden_size * m.index_n_heads


def layer_parameters(m: ModelConfig) -> int:
    """Attention with its indexer and the two norms, without the MLP."""
    heads, latent = m.num_attention_heads, m.kv_lora_rank
    queries = m.hidden_size * m.q_lora_rank + m.q_lora_rank + m.q_lora_rank * heads * m.qk_head_dim
    keys_values = m.hidden_size * (latent + m.qk_rope_head_dim) + latent
    keys_values += latent * heads * (m.qk_nope_head_dim + m.v_head_dim)
    out = heads * m.v_head_dim * m.hidden_size
    return queries + keys_values + out + indexer_parameters(m) + 2 * m.hidden_size


def moe_parameters(m: ModelConfig) -> int:
    experts = m.n_routed_experts + m.n_shared_experts
    return m.n_routed_experts * m.hidden_size + experts * 3 * m.hidden_size * m.moe_intermediate_size


def total_parameters(m: ModelConfig, mtp: bool = False) -> int:
    """By the architecture's formula; the router's bias is a buffer and not counted."""
    dense, layers = m.first_k_dense_replace, m.num_hidden_layers
    mlps = dense * 3 * m.hidden_size * m.intermediate_size + (layers - dense) * moe_parameters(m)
    ends = 2 * m.vocab_size * m.hidden_size + m.hidden_size
    module = layer_parameters(m) + moe_parameters(m) + 3 * m.hidden_size + 2 * m.hidden_size**2
    return layers * layer_parameters(m) + mlps + ends + (m.num_mtp_layers * module if mtp else 0)


def test_deepseek_v3_2_is_the_public_config() -> None:
    assert preset("deepseek_v3_2") == ModelConfig(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        first_k_dense_replace=3,
        max_position_embeddings=163840,
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        tie_word_embeddings=False,
        rope=RopeConfig(10000.0, 40.0, 4096, 32.0, 1.0, 1.0, 1.0),
        num_nextn_predict_layers=1,
        mtp="keep",
        index_n_heads=64,
        index_head_dim=128,
        index_topk=2048,
    )


def test_deepseek_v3_2_counts() -> None:
    model = preset("deepseek_v3_2")
    assert indexer_parameters(model) == 13_959_424
    assert 61 * indexer_parameters(model) == 851_524_864
    without_indexer = total_parameters(model) - 61 * indexer_parameters(model)
    assert without_indexer == 671_026_404_352  # DeepSeek-V3's own


@pytest.mark.parametrize(("name", "low", "high"), [("tiny", 2.3e6, 2.7e6), ("small", 140e6, 160e6)])
def test_stated_sizes(name: str, low: float, high: float) -> None:
    assert low <= total_parameters(preset(name), mtp=True) <= high


def test_tiny_keeps_to_a_small_vocabulary() -> None:
    assert preset("tiny").vocab_size <= 2048


def test_v2_lite_has_its_namesakes_size_and_a_query_latent() -> None:
    model = preset("deepseek_v2_lite")
    assert 15e9 <= total_parameters(model) <= 16.5e9
    assert model.q_lora_rank > 0


@pytest.mark.parametrize("group", GROUPS)
def test_each_preset_is_valid(group: str) -> None:
    for name in presets(group):
        assert violations(load(["+stage=pretrain", f"{group}={name}"]).config) == [], name


def test_speciale_runs_on_the_full_model_as_it_stands() -> None:
    """64K tokens, no tools, less of a penalty than the standard profile; with proofs, rows say which are."""
    judge = ["rl.judge_url=http://host/v1", "rl.judge_model=m", "rl.path=rows.jsonl"]
    for name, more in (("speciale", []), ("speciale_proof", judge)):
        config = load(["+stage=grpo", "model=deepseek_v3_2", f"rl={name}", *more]).config
        assert violations(config) == [] and config.rl.max_new_tokens >= 64 * 1024 and not config.rl.use_tools
        assert config.rl.length_penalty < load(["+stage=grpo"]).config.rl.length_penalty
    assert (config.rl.of("proof").outcome, config.rl.of("math").outcome) == ("proof", "math_verify")


def test_selections_are_recorded_where_they_fit() -> None:
    rl = load(["+stage=grpo"]).config.rl
    assert rl.records_selection(preset("tiny")) and not rl.records_selection(preset("deepseek_v3_2"))
    asked = load(["+stage=grpo", "rl.record_selection=true"]).config.rl
    assert asked.records_selection(preset("deepseek_v3_2"))
