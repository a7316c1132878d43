"""config.json <-> `ModelConfig`: reads `deepseek_v3` and `deepseek_v32`, writes `deepseek_v32`.

RoPE is read in both styles, transformers 5's `rope_parameters` and DeepSeek's own `rope_scaling` + `rope_theta`, and
written in both, so that transformers, vLLM and SGLang of either generation agree. Whatever this model cannot
represent is refused by name: a key that is passed over in silence is a wrong model that runs.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

from conf.errors import UserError
from conf.schema import ModelConfig, RopeConfig

MODEL_TYPES = ("deepseek_v3", "deepseek_v32")
# A dense checkpoint has no indexer: it gets DeepSeek-V3.2's, unless the user says otherwise.
V32_INDEXER = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
OVERRIDES = (*V32_INDEXER, "mtp")
FP8_BLOCK = [128, 128]

# Keys with one value that this model can represent. An absent key has it, and so has null where it is listed.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, None),
    "tie_word_embeddings": (False,),
    "rope_interleave": (True,),
    "indexer_rope_interleave": (False, None),
}
# Absent, these mean what both Hugging Face classes take them to mean; every other field must be there.
_OPTIONAL: dict[str, Any] = {
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
}
_ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "attention_factor", "truncate", "partial_rotary_factor",
}  # fmt: skip


def load_config_json(folder: str | Path) -> dict[str, Any]:
    """The folder's config.json as a dict. UserError where there is none or it is no JSON object."""
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        inner = folder / "hf"
        fix = f"did you mean {inner}?" if (inner / "config.json").is_file() else "give a Hugging Face model folder"
        raise UserError(f"{folder} holds no config.json: {fix}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({' '.join(str(error).split())}): fetch it again") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a JSON object: fetch it again")
    return raw


def parse_config(raw: dict[str, Any], where: str, **overrides: Any) -> ModelConfig:
    """A config.json's content -> ModelConfig. `where` names the file in errors; `overrides`: `index_*` and `mtp`.

    Raises UserError naming the key and its value for whatever the model cannot represent.
    """
    unknown = [key for key in overrides if key not in OVERRIDES]
    if unknown:
        raise UserError(
            f"model.{unknown[0]} comes from {where} and cannot be overridden: only {', '.join(OVERRIDES)} can"
        )
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(f"{where}: model_type={model_type!r} is not supported: give one of {', '.join(MODEL_TYPES)}")
    _refuse_unsupported(raw, where)
    source = dict(V32_INDEXER) | raw if model_type == "deepseek_v3" else raw
    values: dict[str, Any] = {"rope": _read_rope(raw, where)}
    hints = get_type_hints(ModelConfig)
    for spec in fields(ModelConfig):
        if spec.name in ("rope", "mtp"):
            continue
        if spec.name not in source and spec.name not in _OPTIONAL:
            raise UserError(f"{where}: {spec.name} is missing: a {model_type} config.json has it")
        values[spec.name] = _typed(spec.name, source.get(spec.name, _OPTIONAL.get(spec.name)), hints[spec.name], where)
    for key in ("index_n_heads", "index_head_dim"):
        if model_type == "deepseek_v32" and overrides.get(key, values[key]) != values[key]:
            raise UserError(
                f"model.{key}={overrides[key]} differs from {where}, which has {values[key]}: only a dense checkpoint"
                f" (deepseek_v3) takes another indexer, drop model.{key}"
            )
    config = ModelConfig(**(values | overrides))
    _check_fit(config, raw, where)
    return config


def _typed(key: str, value: Any, kind: type, where: str) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        shown = "null" if value is None else repr(value)
        raise UserError(f"{where}: {key}={shown:.60} is not supported: it must be of type {kind.__name__}")
    return value


def _refuse_unsupported(raw: dict[str, Any], where: str) -> None:
    for key, allowed in _FIXED.items():
        value = raw.get(key, allowed[0])
        if value not in allowed:
            raise UserError(f"{where}: {key}={value!r} is not supported: this model has {key}={allowed[0]!r} alone")
    heads, kv_heads = raw.get("num_attention_heads"), raw.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise UserError(
            f"{where}: num_key_value_heads={kv_heads} is not supported: MLA has num_attention_heads={heads}"
        )
    dense, layers = raw.get("first_k_dense_replace"), raw.get("num_hidden_layers")
    kinds = raw.get("mlp_layer_types")
    if kinds is not None and type(dense) is int and type(layers) is int:
        expected = ["dense" if i < dense else "sparse" for i in range(layers)]
        if kinds != expected:
            raise UserError(
                f"{where}: mlp_layer_types is not first_k_dense_replace={dense} dense layers, then MoE: unsupported"
            )
    quantization = raw.get("quantization_config")
    if quantization is not None:
        known = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": FP8_BLOCK}
        for key, wanted in known.items():
            found = quantization.get(key, wanted if key == "fmt" else None)
            if found != wanted:
                raise UserError(
                    f"{where}: quantization_config.{key}={found!r} is not supported: only {key}={wanted!r} is"
                )


def _read_rope(raw: dict[str, Any], where: str) -> RopeConfig:
    found = {}
    for style in ("rope_parameters", "rope_scaling"):
        if raw.get(style):
            found[style] = _parse_rope(raw[style], raw, f"{where}: {style}")
    if len(set(found.values())) > 1:
        raise UserError(f"{where}: rope_parameters and rope_scaling disagree: remove the one that is wrong")
    return next(iter(found.values())) if found else _parse_rope({}, raw, where)


def _parse_rope(rope: Any, raw: dict[str, Any], where: str) -> RopeConfig:
    if not isinstance(rope, dict):
        raise UserError(f"{where}={rope!r:.60} is not supported: give a JSON object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise UserError(f"{where}.rope_type={kind!r} is not supported: default and yarn are")
    unknown = sorted(set(rope) - _ROPE_KEYS)
    if unknown:
        raise UserError(f"{where}.{unknown[0]}={rope[unknown[0]]!r:.60} is not supported")
    for key, only in (("attention_factor", None), ("truncate", True), ("partial_rotary_factor", 1.0)):
        if rope.get(key, only) not in (only, None):
            raise UserError(f"{where}.{key}={rope[key]!r} is not supported: leave it out")

    def number(key: str, default: float) -> float:
        value = default if rope.get(key) is None else rope[key]
        return _typed(key, value, float, where)

    theta = number("rope_theta", raw.get("rope_theta") or 10000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    if rope.get("factor") is None or number("factor", 0.0) < 1:
        raise UserError(f"{where}.factor={rope.get('factor')!r} is not supported: YaRN takes a number of at least 1")
    original = rope.get("original_max_position_embeddings", raw.get("max_position_embeddings"))
    return RopeConfig(
        theta=theta,
        factor=number("factor", 1.0),
        original_max_position_embeddings=_typed("original_max_position_embeddings", original, int, where),
        # null and 0 fall back to these, as in transformers
        beta_fast=number("beta_fast", 32.0) or 32.0,
        beta_slow=number("beta_slow", 1.0) or 1.0,
        mscale=number("mscale", 0.0),
        mscale_all_dim=number("mscale_all_dim", 0.0),
    )


def _check_fit(config: ModelConfig, raw: dict[str, Any], where: str) -> None:
    if config.index_head_dim < config.qk_rope_head_dim:
        rotary = config.qk_rope_head_dim
        raise UserError(
            f"model.index_head_dim={config.index_head_dim} has no room for qk_rope_head_dim={rotary} of {where}:"
            f" give model.index_head_dim={rotary} or more"
        )
    if config.mtp not in ("keep", "drop"):
        raise UserError(f"model.mtp={config.mtp!r} is not known: give keep or drop")
    if config.first_k_dense_replace > config.num_hidden_layers:
        layers = config.num_hidden_layers
        raise UserError(
            f"{where}: first_k_dense_replace={config.first_k_dense_replace} is past num_hidden_layers={layers}"
        )
    if config.n_group < 1 or config.n_routed_experts % config.n_group:
        raise UserError(f"{where}: n_group={config.n_group} does not divide n_routed_experts={config.n_routed_experts}")


def write_config(
    config: ModelConfig,
    dtype: str = "bfloat16",
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
) -> dict[str, Any]:
    """ModelConfig -> the content of a DeepSeek-V3.2 config.json. `dtype` is the name of the tensors' dtype in torch
    (float8_e4m3fn: block FP8, the rest bf16).

    Token ids are written even when null: Hugging Face's class would take ids 0 and 1 for absent ones.
    """
    written: dict[str, Any] = {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
    written |= {key: value for key, value in asdict(config).items() if key not in ("rope", "mtp")}
    written["num_nextn_predict_layers"] = config.num_mtp_layers
    written["num_key_value_heads"] = config.num_attention_heads
    written |= {key: _FIXED[key][0] for key in ("hidden_act", "scoring_func", "topk_method", "moe_layer_freq")}
    written |= {"attention_bias": False, "attention_dropout": 0.0, "use_cache": True}
    written |= {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": None}
    rope = _yarn_keys(config.rope)
    written["rope_theta"] = config.rope.theta
    written["rope_scaling"] = {"type": "yarn", **rope} if rope else None
    written["rope_parameters"] = {"rope_type": "yarn" if rope else "default", "rope_theta": config.rope.theta, **rope}
    fp8 = dtype == "float8_e4m3fn"
    if fp8:
        written["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": FP8_BLOCK,
        }
    kept = "bfloat16" if fp8 else dtype
    written |= {"dtype": kept, "torch_dtype": kept}
    return written


def _yarn_keys(rope: RopeConfig) -> dict[str, Any]:
    if rope.factor <= 1:
        return {}
    keys = {
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
    }
    # A zero means absent: readers of the explicit 0 disagree
    return keys | {
        key: value for key, value in (("mscale", rope.mscale), ("mscale_all_dim", rope.mscale_all_dim)) if value
    }
