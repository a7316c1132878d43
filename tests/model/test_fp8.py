"""Block-FP8 weights: exact dequantisation with cut-off edge blocks, and a whole checkpoint of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conf.errors import UserError
from model.fp8 import BLOCK, dequantize, quantize, scale_shape
from model.hf import from_pretrained, save_pretrained
from model.hf_config import write_config
from tests.model.hf_cases import (
    TOLERANCE,
    T,
    make_config,
    make_net,
    make_oracle,
    oracle_class,
    oracle_config,
    random_ids,
    read_tensors,
    write_checkpoint,
)

# 576 = 512 + 64 is kv_a_proj_with_mqa's height in DeepSeek-V3; deriving blocks from rows // scale rows fails there, and
# is silently wrong for 192
SHAPES = [(576, 256), (192, 130), (128, 128), (1, 1), (129, 127), (64, 300)]


def by_block(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [R, C] -> e4m3 and scales that are powers of two (ue8m0, as in V3.1), block by block."""
    scale = torch.empty(scale_shape(tuple(weight.shape)))
    stored = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scale[i, j] = torch.exp2((weight[block].abs().max().clamp(min=1e-4) / 448).log2().ceil())
            stored[block] = (weight[block] / scale[i, j]).to(torch.float8_e4m3fn)
    return stored, scale


def graded(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Random, growing over rows and columns by orders of magnitude: a scale used one row too far shows."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    rows, columns = torch.arange(shape[0]).unsqueeze(1) / 64, torch.arange(shape[1]) / 64
    return noise * torch.exp2(rows + columns)


def by_element(stored: Tensor, scale: Tensor) -> Tensor:
    """The definition, element by element."""
    out = torch.empty(stored.shape)
    rows, columns = stored.shape
    wide = stored.float()
    for i in range(rows):
        for j in range(columns):
            out[i, j] = wide[i, j] * scale[i // BLOCK, j // BLOCK]
    return out


@pytest.mark.parametrize("shape", [(129, 127), (1, 1), (3, 300)])
def test_every_element_has_the_scale_of_its_block(shape: tuple[int, int]) -> None:
    stored, scale = quantize(graded(shape))
    assert torch.equal(dequantize(stored, scale), by_element(stored, scale))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_is_the_definition_block_by_block(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = graded(shape).to(dtype)
    stored, scale = quantize(weight)
    expected, expected_scale = by_block(weight.float())
    assert torch.equal(scale, expected_scale) and scale.dtype == torch.float32
    assert torch.equal(stored.view(torch.uint8), expected.view(torch.uint8))


def test_outliers_zeros_and_tiny_numbers() -> None:
    """An outlier costs its own block its small numbers and no other; a block of zeros has a finite scale."""
    weight = torch.full((256, 256), 0.01)
    weight[3, 5], weight[:128, 128:], weight[128:, :128] = 1e4, 0.0, 1e-30
    stored, scale = quantize(weight)
    assert scale.isfinite().all() and (scale > 0).all() and not stored.float().isnan().any()
    once = dequantize(stored, scale)
    assert once[3, 5] == pytest.approx(1e4, rel=2**-4) and once[0, 0] == 0  # below the outlier's smallest step
    assert (once[:128, 128:] == 0).all() and (once[128:, :128] == 0).all()
    torch.testing.assert_close(once[128:, 128:], weight[128:, 128:], rtol=2**-4, atol=0)


def test_an_amax_on_the_border_keeps_its_scale() -> None:
    for amax, scale in ((448.0, 1.0), (448.5, 2.0), (224.0, 0.5)):
        assert quantize(torch.full((2, 2), amax))[1].item() == scale


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(shape: tuple[int, int]) -> None:
    weight = graded(shape)
    stored, scale = quantize(weight)
    once = dequantize(stored, scale)
    # e4m3 keeps 3 bits of mantissa: half a step is 2^-4, below 2^-6 of the scale steps are uniform
    assert ((once - weight).abs() <= torch.maximum(weight.abs() * 2**-4, by_scale(scale, shape) * 2**-10)).all()
    again, scale_again = quantize(once)
    assert torch.equal(again.view(torch.uint8), stored.view(torch.uint8)) and torch.equal(scale_again, scale)


def by_scale(scale: Tensor, shape: tuple[int, int]) -> Tensor:
    return scale.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]


def test_scales_that_do_not_cover_the_weight_are_refused() -> None:
    stored = torch.zeros(576, 256).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"\[4, 2\] do not cover a weight \[576, 256\]"):
        dequantize(stored, torch.ones(4, 2))


def fp8_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """A V3 checkpoint with dimensions that are no multiples of 128, its linear weights in block FP8 as DeepSeek stores
    them. Returns (tensors written, the same dequantised by hand, config.json)."""
    config = make_config(
        hidden_size=192, q_lora_rank=144, kv_lora_rank=128, moe_intermediate_size=136, intermediate_size=260,
        num_hidden_layers=2, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2,
    )  # fmt: skip
    make_oracle(config, "dense").save_pretrained(folder)
    written, plain = {}, {}
    for name, tensor in read_tensors(folder).items():
        kept = tensor.dim() != 2 or ".mlp.gate." in name or "embed" in name or "lm_head" in name
        if kept:
            written[name] = plain[name] = tensor
            continue
        stored, scale = by_block(tensor)
        written[name], written[f"{name}_scale_inv"] = stored, scale
        plain[name] = stored.float() * by_scale(scale, tuple(tensor.shape))  # type: ignore[arg-type]
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    raw = write_config(config) | {"model_type": "deepseek_v3", "quantization_config": quantization}
    (folder / "model.safetensors").unlink()
    write_checkpoint(folder, written, raw)
    return written, plain, raw


@torch.no_grad()
def test_an_fp8_checkpoint_equals_its_dequantised_twin(tmp_path: Path) -> None:
    written, plain, raw = fp8_checkpoint(tmp_path / "fp8")
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in written.values()) > 20
    net = from_pretrained(tmp_path / "fp8", index_head_dim=16)
    ids = random_ids()
    write_checkpoint(tmp_path / "plain", plain, raw | {"quantization_config": None})
    config = oracle_config(net.config, "dense")
    oracle = oracle_class("dense").from_pretrained(tmp_path / "plain", config=config, dtype=torch.float32)
    theirs = oracle(ids).logits
    assert theirs.std() > 0.3
    torch.testing.assert_close(net.logits(ids, attention="dense"), theirs, rtol=0, atol=TOLERANCE)
    twin = from_pretrained(tmp_path / "plain", index_head_dim=16).state_dict()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, twin[name]), name


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("missing", "lacks tensor {scale}"),
        ("wrong", "tensor {scale} has shape [1, 2], 128x128 blocks need [2, 2]"),
        ("orphan", "tensor model.norm.weight_scale_inv scales no FP8 weight"),
    ],
)
def test_scales_that_do_not_fit_are_named(change: str, named: str, tmp_path: Path) -> None:
    written, _, raw = fp8_checkpoint(tmp_path)
    scale = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"
    if change == "missing":
        del written[scale]
    elif change == "wrong":
        written[scale] = written[scale][:1]
    else:
        written["model.norm.weight_scale_inv"] = torch.ones(2)
    write_checkpoint(tmp_path, written, raw)
    with pytest.raises(UserError) as caught:
        from_pretrained(tmp_path, index_head_dim=16)
    assert named.format(scale=scale) in str(caught.value) and "model.safetensors" in str(caught.value)


# --- written ---

LINEARS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "wq_b", "wk")
MLPS = ("gate_proj", "up_proj", "down_proj")


@torch.no_grad()
def test_written_in_deepseeks_layout_and_read_again(tmp_path: Path) -> None:
    """e4m3 beside fp32 scales for the linear weights alone, config.json that says so; read and written again: the same
    numbers."""
    net = make_net(make_config(hidden_size=192, kv_lora_rank=128, intermediate_size=260, num_nextn_predict_layers=1))
    save_pretrained(net, tmp_path / "one", dtype=torch.float8_e4m3fn, max_shard_bytes=300_000)
    tensors = read_tensors(tmp_path / "one")
    for name, tensor in tensors.items():
        leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if name.endswith("_scale_inv"):
            weight = tensors[name.removesuffix("_scale_inv")]
            assert tensor.dtype == torch.float32 and tensor.shape == scale_shape(tuple(weight.shape)), name
        else:
            assert (tensor.dtype == torch.float8_e4m3fn) == (leaf in (*LINEARS, *MLPS)), name
            assert (f"{name}_scale_inv" in tensors) == (tensor.dtype == torch.float8_e4m3fn), name
    assert {tensors[f"model.layers.0.self_attn.indexer.{n}.weight"].dtype for n in ("wq_b", "wk")} == {
        torch.float8_e4m3fn
    }
    assert tensors["model.embed_tokens.weight"].dtype == tensors["lm_head.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.3.eh_proj.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16  # as DeepSeek-V3.2's
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    raw = json.loads((tmp_path / "one" / "config.json").read_text())
    assert raw["dtype"] == "bfloat16" and raw["quantization_config"] == {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }  # fmt: skip
    again = from_pretrained(tmp_path / "one")
    for name, tensor in net.state_dict().items():
        error = (again.state_dict()[name] - tensor).norm() / tensor.norm()
        assert error < 0.04, name  # e4m3 keeps 4 bits; bf16 and fp32 far more
    save_pretrained(again, tmp_path / "two", dtype=torch.float8_e4m3fn)
    third = from_pretrained(tmp_path / "two").state_dict()
    assert all(torch.equal(tensor, third[name]) for name, tensor in again.state_dict().items())


@torch.no_grad()
def test_transformers_reads_what_was_written(tmp_path: Path) -> None:
    """With dimensions that are multiples of 128: its reader takes no others."""
    from transformers import DeepseekV32ForCausalLM, FineGrainedFP8Config

    net = make_net(
        make_config(
            hidden_size=128, intermediate_size=256, moe_intermediate_size=128, q_lora_rank=128, kv_lora_rank=64,
            qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=64, num_attention_heads=2, index_n_heads=2,
            index_head_dim=128, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2,
        )
    )  # fmt: skip
    for tensor in net.state_dict().values():
        tensor.copy_(tensor.bfloat16())  # they read into bf16, which holds every e4m3 number but no fp32 norm
    save_pretrained(net, tmp_path, dtype=torch.float8_e4m3fn)
    wanted = FineGrainedFP8Config(dequantize=True)
    theirs = DeepseekV32ForCausalLM.from_pretrained(tmp_path, quantization_config=wanted, dtype=torch.bfloat16)
    config = from_pretrained(tmp_path).config
    oracle = oracle_class("sparse")(oracle_config(config, "sparse")).eval()
    oracle.load_state_dict({name: tensor.float() for name, tensor in theirs.state_dict().items()})
    mine = from_pretrained(tmp_path, index_topk=T)
    oracle.config.index_topk = T
    for layer in oracle.model.layers:
        layer.self_attn.indexer.index_topk = T
    ids = random_ids()
    expected = oracle(ids).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(mine.logits(ids, attention="sparse"), expected, rtol=0, atol=TOLERANCE)
