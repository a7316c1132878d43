"""Parameters as data: the model's own names, shapes and order, and the counts that reports give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conf.load import load, presets
from conf.schema import ModelConfig
from model import Transformer
from tests.train import tiny
from train.optim import select_trainable
from train.parameters import counts, parameters
from train.stages import STAGES


def on_meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


@pytest.mark.parametrize("preset", presets("model"))
def test_names_and_shapes_are_the_models(preset: str) -> None:
    config = load(["+stage=pretrain", f"model={preset}"]).config.model
    found = [(p.name, p.shape) for p in parameters(config)]
    assert found == [(name, tuple(p.shape)) for name, p in on_meta(config).named_parameters()]


@pytest.mark.parametrize("changes", [{"first_k_dense_replace": 2}, {"first_k_dense_replace": 0}, {"mtp": "drop"}])
def test_what_trains_is_what_the_stage_says(changes: dict[str, object]) -> None:
    config = replace(tiny.MODEL, **changes)  # type: ignore[arg-type]
    net = on_meta(config)
    for stage in STAGES.values():
        select_trainable(net, stage)
        trains = {name for name, p in net.named_parameters() if p.requires_grad}
        assert {p.name for p in parameters(config) if p.trains(stage)} == trains


def test_counts_of_v3_2() -> None:
    config = load(["+stage=pretrain", "model=deepseek_v3_2"]).config.model
    found = counts(config)
    assert found.indexer == 62 * 13_959_424
    main = found.total - found.mtp
    assert 671e9 < main - 61 * 13_959_424 < 671.1e9 and 37e9 < found.active < 38e9
    assert found.experts == 59 * 256 * 3 * 7168 * 2048
