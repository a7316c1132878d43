"""model=deepseek_v3_2 against what DeepSeek publishes: every tensor's name, dtype and shape, and config.json.

Three accounts of the same 92,425 tensors: the public listing, the formulas of model/hf_index.py, and what an export of
our model (on the meta device) would write; transformers' own module is the fourth, for names and shapes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from conf.load import load
from conf.schema import ModelConfig
from launch.serving_check import config_differences, transformers_tensors
from model.fp8 import scale_shape
from model.hf import _planned
from model.hf_config import parse_config, write_config
from model.hf_index import published
from model.hf_names import Slot, slots, stored_dtype
from model.transformer import Transformer
from tests.model.public_index import BYTES, PUBLIC, public_tensors

NAMES = {torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return load(["+stage=evaluate", "model=deepseek_v3_2"]).config.model


@pytest.fixture(scope="module")
def table(config: ModelConfig) -> list[Slot]:
    with torch.device("meta"):
        return slots(Transformer(config), config)


def test_the_listing_is_whole() -> None:
    """Number and bytes come from another reading of the headers than the listing does."""
    tensors = public_tensors()
    assert len(tensors) == PUBLIC["num_tensors"]
    assert sum(BYTES[dtype] * math.prod(shape) for dtype, shape in tensors.values()) == PUBLIC["num_bytes"]


def test_the_formulas_give_the_public_index(config: ModelConfig) -> None:
    assert {name: (it.dtype, it.shape) for name, it in published(config).items()} == public_tensors()


def test_an_fp8_export_has_the_public_index(config: ModelConfig, table: list[Slot]) -> None:
    fp8, public = torch.float8_e4m3fn, public_tensors()
    ours = {}
    for slot in table:
        kind = NAMES[stored_dtype(slot.hf_name, fp8)]
        ours[slot.hf_name] = (kind, slot.shape)
        if kind == "F8_E4M3":
            ours[f"{slot.hf_name}_scale_inv"] = ("F32", scale_shape(slot.shape))
    assert ours == public
    written = {tensor.name: tensor.num_bytes for tensor in _planned(table, lambda slot: torch.empty(0), fp8)}
    assert written == {name: BYTES[dtype] * math.prod(shape) for name, (dtype, shape) in public.items()}


def test_transformers_wants_the_same_names_and_shapes(tmp_path: Path) -> None:
    # fewer layers and experts: it builds each of them, and they are alike
    fewer = {"num_hidden_layers": 5, "n_routed_experts": 16, "num_experts_per_tok": 4}
    raw = {key: value for key, value in PUBLIC["config"].items() if key != "quantization_config"} | fewer
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs = transformers_tensors(tmp_path)
    wanted = published(parse_config(raw, "config.json"))
    mtp = "model.layers.5."
    assert theirs == {
        name: it.shape for name, it in wanted.items() if not name.endswith("_scale_inv") and not name.startswith(mtp)
    }
    assert len(theirs) == 3 + 5 * 14 + 3 * 3 + 2 * (5 + 16 * 3), "ends, layers, dense MLPs, MoE"


def test_config_json_is_the_public_one(config: ModelConfig) -> None:
    public = PUBLIC["config"]
    ours = write_config(config, "float8_e4m3fn", bos_token_id=0, eos_token_id=1)
    assert {key for key in public if ours.get(key) != public[key]} == {"ep_size", "transformers_version"}
    assert set(ours) - set(public) == {"dtype", "pad_token_id", "rope_parameters"}
    assert parse_config(public, "config.json") == config
    assert config_differences(public, fp8=True) == config_differences(ours, fp8=True) == []
