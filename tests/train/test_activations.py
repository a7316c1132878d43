"""What a forward keeps, to the last byte, against torch's hook on saved tensors."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from bench.plan_memory import random_batch
from conf.schema import ModelConfig
from model import Transformer
from tests.train import tiny
from train import activations
from train.activations import Shape
from train.optim import select_trainable
from train.precision import training_autocast
from train.stages import STAGES
from train.start import OpSettings

T = 32
MODEL = replace(tiny.MODEL, num_hidden_layers=3, n_group=2, topk_group=1, index_topk=5)


def kept(model: ModelConfig, stage_name: str, precision: str, checkpointing: bool = False) -> int:
    """Bytes of the distinct storages that are saved and still there after the forward, the parameters' left out."""
    stage, net = STAGES[stage_name], Transformer(model)
    net.init_weights(0)
    select_trainable(net, stage)
    net.activation_checkpointing = checkpointing
    net.use(OpSettings(fp8_linear="emulate" if precision == "fp8" else None))
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    seen: list[tuple[weakref.ref[torch.Tensor], int, int]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen.append((weakref.ref(tensor), storage.data_ptr(), storage.nbytes()))
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        training_autocast(torch.device("cpu"), precision),
    ):
        out = net(
            **random_batch(model, T, 0),
            attention=stage.attention,
            indexer_loss=stage.indexer_loss,
            lm_loss=stage.lm_loss,
            trunk_grad=stage.trunk_grad,
            mtp=stage.runner == "train",
        )
    alive = {pointer: size for tensor, pointer, size in seen if tensor() is not None and pointer not in own}
    assert out.num_rows == T
    return sum(alive.values())


def predicted(model: ModelConfig, stage_name: str, precision: str) -> int:
    stage = STAGES[stage_name]
    shape = Shape(model, stage, precision, T, T, model.n_routed_experts)
    found = activations.shared(shape) + activations.head(shape)
    for number in range(model.num_hidden_layers):
        found += sum(activations.layer(shape, number >= model.first_k_dense_replace).values())
    if stage.runner == "train" and model.num_mtp_layers:
        found += sum(activations.mtp_entry(shape).values()) + activations.head(shape)
        found += sum(activations.layer(shape, True, shape.b).values())
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("stage", ["pretrain", "dense_warmup", "sparse_adapt", "grpo"])
def test_every_stage_keeps_what_is_predicted(stage: str, precision: str) -> None:
    assert kept(MODEL, stage, precision) == predicted(MODEL, stage, precision)


OTHERS = ({"v_head_dim": 24}, {"norm_topk_prob": False}, {"mtp": "drop"}, {"first_k_dense_replace": 3})


@pytest.mark.parametrize("changes", OTHERS)
@pytest.mark.parametrize("stage", ["pretrain", "sparse_adapt"])
def test_other_models(stage: str, changes: dict[str, object]) -> None:
    model = replace(MODEL, **changes)  # type: ignore[arg-type]
    assert kept(model, stage, "bf16") == predicted(model, stage, "bf16")
