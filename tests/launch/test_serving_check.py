"""The serving check: what an export must pass, and that each kind of difference is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conf.load import load
from launch import serving_check
from launch.serving_check import KERNELS, main
from model import hf
from model.hf import save_pretrained
from model.transformer import Transformer
from tests.model.hf_cases import make_config, make_net

Tensors = dict[str, Tensor]


def exported(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny model with an MTP layer."""
    save_pretrained(make_net(make_config(num_nextn_predict_layers=1)), folder, dtype)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_an_export_passes_and_loads_in_transformers(
    dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    exported(run / "hf", dtype)
    assert main([str(run), "load=yes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(run / "hf") and "DeepseekV32ForCausalLM loaded, logits of 64 tokens" in lines[4]
    assert "none on a GPU for kv_lora_rank=32, qk_rope_head_dim=8, index_head_dim=16, index_topk=8" in lines[5]


def test_the_smoke_preset_has_the_kernels_geometry_and_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(["+stage=pretrain", "model=serving_smoke"]).config.model
    assert all(getattr(config, key) in fits for key, fits in KERNELS.items())
    net = Transformer(config)
    net.init_weights(0)
    save_pretrained(net, tmp_path / "out", torch.float8_e4m3fn)
    assert main([str(tmp_path / "out"), "load=yes"]) == 0
    told = capsys.readouterr().out
    assert "logits of 576 tokens compared" in told and "the sizes that vLLM has them for" in told


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("model.layers.3.hnorm.weight"), "model.layers.3.hnorm.weight is missing"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), "model.extra is in no index"),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()}),
            "model.norm.weight is F16[64], not BF16[64]",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:60].clone()}),
            "lm_head.weight is BF16[60, 64], not BF16[64, 64]",
        ),
    ],
)
def test_a_tensor_that_is_not_as_published_is_told(
    change: Callable[[Tensors], object], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported(tmp_path)
    rewrite(folder, change)
    assert main([str(folder), "load=no"]) == 1
    assert f"  {told}\n" in capsys.readouterr().out


def test_an_fp8_folder_must_have_the_published_dtypes_exactly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported(tmp_path, torch.float8_e4m3fn)
    name = "model.layers.1.mlp.gate.weight"
    rewrite(folder, lambda t: t.update({name: t[name].float()}))
    assert main([str(folder), "load=no"]) == 1
    assert f"  {name} is F32[12, 64], not BF16[12, 64]\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"architectures": ["DeepseekV3ForCausalLM"]}, "architectures=['DeepseekV3ForCausalLM'], not"),
        ({"rope_scaling": ...}, "rope_scaling is missing"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "quantization_config={"),
    ],
)
def test_a_config_that_is_not_as_published_is_told(
    change: dict[str, object], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported(tmp_path) / "config.json"
    raw = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))
    assert main([str(tmp_path), "load=no"]) == 1
    assert f"  {told}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("touched", "told"),
    [("lm_head.", "logits up to 8 tokens are"), (".indexer.wk.", "past 8 tokens, where the indexer")],
)
def test_logits_that_are_not_transformers_are_told(
    touched: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our reader made wrong: in the head, where every position shows it, and in the indexer, where those past k do."""
    read = hf.from_pretrained

    def wrong(folder: Path) -> Transformer:
        net = read(folder)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if touched in name:
                    parameter.copy_(parameter.roll(1, 0))
        return net

    monkeypatch.setattr(hf, "from_pretrained", wrong)
    assert main([str(exported(tmp_path)), "load=yes"]) == 1
    out = capsys.readouterr().out
    assert told in out and ("up to 8" in out) == (touched == "lm_head.")


def test_what_does_not_fit_into_memory_is_said_to_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving_check, "free_memory", lambda: 1000)
    assert main([str(exported(tmp_path))]) == 0
    assert "load          left out, two models in fp32 take 0 GB of 0 free" in capsys.readouterr().out


def test_a_dense_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = exported(tmp_path) / "config.json"
    raw = {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith("index_")}
    path.write_text(json.dumps(raw | {"model_type": "deepseek_v3"}))
    assert main([str(tmp_path), "load=no"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model_type=deepseek_v3 is a dense checkpoint" in line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["x", "y"], "2 folders are given, not 1: usage"),
        (["x", "load=ye"], "load=ye is not known: did you mean yes?"),
        (["x", "lod=no"], "unknown setting lod"),
        (["/nowhere"], "/nowhere/hf holds no config.json"),
    ],
)
def test_mistakes(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
