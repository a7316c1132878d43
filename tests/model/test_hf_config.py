"""config.json: both RoPE styles, defaults, what is refused, and what transformers makes of what we write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from conf.schema import ModelConfig, RopeConfig
from model.hf_config import load_config_json, parse_config, write_config
from tests.model.hf_cases import PLAIN, YARN, make_config, oracle_config

# The RoPE part of DeepSeek-V3's public config.json
DEEPSEEK_ROPE = {
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip


def dense_json(**changes: Any) -> dict[str, Any]:
    """A deepseek_v3 config.json in DeepSeek's own style."""
    raw = write_config(make_config(index_head_dim=128))
    for key in ("rope_parameters", "dtype", "index_n_heads", "index_head_dim", "index_topk"):
        del raw[key]
    extra = {"model_type": "deepseek_v3", "ep_size": 1, "num_nextn_predict_layers": 1, "pretraining_tp": 1}
    return raw | extra | DEEPSEEK_ROPE | changes


def sparse_json(**changes: Any) -> dict[str, Any]:
    return write_config(make_config()) | changes


@pytest.mark.parametrize("rope", [YARN, PLAIN, RopeConfig(factor=40.0, mscale=0.0, mscale_all_dim=0.0)])
@pytest.mark.parametrize("mtp_layers", [0, 1])
def test_write_then_read_is_the_identity(rope: RopeConfig, mtp_layers: int) -> None:
    config = make_config(rope=rope, num_nextn_predict_layers=mtp_layers, norm_topk_prob=False)
    assert parse_config(json.loads(json.dumps(write_config(config))), "x") == config


def test_the_default_architecture_survives() -> None:
    config = ModelConfig()
    assert parse_config(write_config(config), "x") == config


def test_dropped_mtp_layers_are_not_announced() -> None:
    raw = write_config(make_config(num_nextn_predict_layers=1, mtp="drop"))
    assert raw["num_nextn_predict_layers"] == 0


def test_both_rope_styles_mean_the_same() -> None:
    old = dense_json()
    new = {key: value for key, value in old.items() if key not in DEEPSEEK_ROPE}
    new["rope_parameters"] = {**DEEPSEEK_ROPE["rope_scaling"], "rope_theta": 10000}  # type: ignore[dict-item]
    expected = RopeConfig(10000.0, 40.0, 4096, 32.0, 1.0, 1.0, 1.0)
    assert parse_config(old, "x").rope == parse_config(new, "x").rope == expected
    plain = {key: value for key, value in old.items() if key != "rope_scaling"}
    assert parse_config(plain | {"rope_theta": 5e5}, "x").rope == RopeConfig(theta=5e5)
    assert parse_config(plain | {"rope_scaling": None}, "x").rope == RopeConfig()


def test_a_dense_checkpoint_gets_v32s_indexer_unless_told_otherwise() -> None:
    config = parse_config(dense_json(), "x")
    assert (config.index_n_heads, config.index_head_dim, config.index_topk) == (64, 128, 2048)
    config = parse_config(dense_json(), "x", index_n_heads=8, index_head_dim=16, index_topk=4, mtp="drop")
    assert (config.index_n_heads, config.index_head_dim, config.index_topk) == (8, 16, 4)
    assert config.num_mtp_layers == 0 and config.num_nextn_predict_layers == 1
    with pytest.raises(UserError, match=r"model.index_head_dim=4 has no room for qk_rope_head_dim=8"):
        parse_config(dense_json(), "x", index_head_dim=4)


def test_a_sparse_checkpoint_keeps_its_indexer() -> None:
    assert parse_config(sparse_json(), "x", index_topk=5).index_topk == 5
    with pytest.raises(UserError, match=r"model.index_n_heads=8 differs from x, which has 16: only a dense"):
        parse_config(sparse_json(), "x", index_n_heads=8)
    with pytest.raises(UserError, match=r"model.hidden_size comes from x and cannot be overridden"):
        parse_config(sparse_json(), "x", hidden_size=8)
    with pytest.raises(UserError, match=r"model.mtp='maybe' is not known"):
        parse_config(sparse_json(), "x", mtp="maybe")


YARN_KEYS = write_config(make_config())["rope_scaling"]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llama"}, "model_type='llama'"),
    ({"q_lora_rank": None}, "q_lora_rank=null"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"mlp_bias": True}, "mlp_bias=True"),
    ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
    ({"topk_method": "greedy"}, "topk_method='greedy'"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
    ({"rope_interleave": False}, "rope_interleave=False"),
    ({"indexer_rope_interleave": True}, "indexer_rope_interleave=True"),
    ({"num_key_value_heads": 2}, "num_key_value_heads=2"),
    ({"n_group": None}, "n_group=null"),
    ({"n_group": 5}, "n_group=5"),
    ({"hidden_size": "64"}, "hidden_size='64'"),
    ({"norm_topk_prob": 1}, "norm_topk_prob=1"),
    ({"first_k_dense_replace": 9}, "first_k_dense_replace=9"),
    ({"mlp_layer_types": ["sparse", "dense", "sparse"]}, "mlp_layer_types"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method='awq'"),
    (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
        "quantization_config.weight_block_size=[64, 64]",
    ),
    ({"rope_scaling": "yarn", "rope_parameters": None}, "rope_scaling='yarn'"),
    ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": None}, "rope_scaling.rope_type='linear'"),
    ({"rope_scaling": YARN_KEYS | {"factor": None}, "rope_parameters": None}, "rope_scaling.factor=None"),
    ({"rope_scaling": YARN_KEYS | {"factor": 0.5}, "rope_parameters": None}, "rope_scaling.factor=0.5"),
    ({"rope_scaling": YARN_KEYS | {"attention_factor": 1.3}, "rope_parameters": None}, "attention_factor=1.3"),
    ({"rope_scaling": YARN_KEYS | {"truncate": False}, "rope_parameters": None}, "truncate=False"),
    ({"rope_scaling": YARN_KEYS | {"long_factor": [1]}, "rope_parameters": None}, "long_factor=[1]"),
    ({"rope_scaling": YARN_KEYS | {"factor": 8.0}}, "rope_parameters and rope_scaling disagree"),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_what_cannot_be_represented_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(sparse_json(**changes), "some/config.json")
    message = str(caught.value)
    assert named in message and "some/config.json" in message and "\n" not in message


@pytest.mark.parametrize("key", ["vocab_size", "q_lora_rank", "n_group", "index_topk"])
def test_a_missing_key_is_named(key: str) -> None:
    raw = sparse_json()
    del raw[key]
    with pytest.raises(UserError, match=f"{key} is missing"):
        parse_config(raw, "x")


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no config.json"):
        load_config_json(tmp_path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{oops")
    with pytest.raises(UserError, match=r"did you mean .*hf\?"):
        load_config_json(tmp_path)
    with pytest.raises(UserError, match="is not JSON"):
        load_config_json(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="is not a JSON object"):
        load_config_json(tmp_path / "hf")


def test_the_published_config_is_the_preset() -> None:
    from conf.load import load

    # DeepSeek-V3.2-Exp's config.json, as published
    published = {
        "architectures": ["DeepseekV32ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
        "hidden_size": 7168, "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048,
        "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v32", "moe_intermediate_size": 2048,
        "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-06, **DEEPSEEK_ROPE, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
        "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
    }  # fmt: skip
    assert parse_config(published, "x") == load(["+stage=dense_warmup", "model=deepseek_v3_2"]).config.model


@pytest.mark.parametrize("rope", [YARN, PLAIN])
def test_transformers_understands_what_we_write(rope: RopeConfig, tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = make_config(rope=rope, num_nextn_predict_layers=1)
    (tmp_path / "config.json").write_text(json.dumps(write_config(config, "bfloat16", eos_token_id=7)))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "DeepseekV32Config"
    assert (theirs.bos_token_id, theirs.eos_token_id, str(theirs.dtype)) == (None, 7, "torch.bfloat16")
    wanted = {"rope_type": "yarn" if rope is YARN else "default", "rope_theta": rope.theta}
    assert wanted.items() <= theirs.rope_parameters.items()
    # and what they write of it, we read back
    (tmp_path / "again").mkdir()
    theirs.save_pretrained(tmp_path / "again")
    assert parse_config(load_config_json(tmp_path / "again"), "x") == config


def test_what_transformers_writes_of_a_dense_model_is_read(tmp_path: Path) -> None:
    config = make_config(index_head_dim=128)
    oracle_config(config, "dense").save_pretrained(tmp_path)
    raw = load_config_json(tmp_path)
    assert raw["model_type"] == "deepseek_v3" and "rope_scaling" not in raw
    expected = replace(config, index_n_heads=64, index_topk=2048)
    assert parse_config(raw, "x") == expected
