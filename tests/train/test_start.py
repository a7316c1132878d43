"""What a run starts from, and how each wrong start is refused in one line."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.convert import save_yaml
from conf.errors import UserError
from conf.schema import (
    DataConfig,
    DomainConfig,
    ModelConfig,
    OpsConfig,
    OptimConfig,
    RLConfig,
    RopeConfig,
    RunConfig,
    TrackerConfig,
)
from model.hf import save_pretrained
from tests.train import tiny
from train.run import MAY_CHANGE
from train.stages import STAGES
from train.start import (
    checkpoint_model,
    default_start,
    default_tokenizer,
    differences,
    op_settings,
    resolve,
    weights_folder,
)

NONE: frozenset[str] = frozenset()


def finished(folder: Path, stage: str, when: float, hf: bool = True) -> None:
    (folder / "hf").mkdir(parents=True)
    save_yaml(RunConfig(stage=stage, output_dir=str(folder)), folder / "config.yaml")
    if hf:
        (folder / "hf" / "config.json").write_text("{}")
        os.utime(folder / "hf" / "config.json", (when, when))


def test_the_newest_finished_run_of_the_stage_before_is_the_start(tmp_path: Path) -> None:
    finished(tmp_path / "old", "dense_warmup", 100)
    finished(tmp_path / "demo" / "new", "dense_warmup", 200)
    finished(tmp_path / "other", "pretrain", 300)
    finished(tmp_path / "unfinished", "dense_warmup", 400, hf=False)
    assert default_start(STAGES["sparse_adapt"], tmp_path) == str(tmp_path / "demo" / "new")
    assert default_start(STAGES["dense_warmup"], tmp_path) == str(tmp_path / "other")
    assert default_start(STAGES["evaluate"], tmp_path) == str(tmp_path / "other")
    assert default_start(STAGES["pretrain"], tmp_path) is None
    with pytest.raises(UserError, match=r"no finished run of sft or sparse_adapt: run \+stage=sft first"):
        default_start(STAGES["grpo"], tmp_path)


def test_init_from_is_a_checkpoint_folder_or_a_run(tmp_path: Path) -> None:
    finished(tmp_path / "run", "pretrain", 1)
    assert weights_folder(str(tmp_path / "run")) == tmp_path / "run" / "hf"
    assert weights_folder(str(tmp_path / "run" / "hf")) == tmp_path / "run" / "hf"
    with pytest.raises(UserError, match="does not exist"):
        weights_folder(str(tmp_path / "nowhere"))
    finished(tmp_path / "half", "pretrain", 1, hf=False)
    with pytest.raises(UserError, match="has not finished"):
        weights_folder(str(tmp_path / "half"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no config.json and no hf/"):
        weights_folder(str(tmp_path / "empty"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "hf"
    save_pretrained(tiny.build(), folder)
    return folder


def test_the_checkpoint_sets_the_architecture(saved: Path) -> None:
    assert checkpoint_model(saved, ModelConfig(), NONE) == tiny.MODEL
    given = replace(ModelConfig(), index_topk=7, mtp="drop")
    found = checkpoint_model(saved, given, frozenset({"model.index_topk", "model.mtp"}))
    assert found == replace(tiny.MODEL, index_topk=7, mtp="drop")


def test_a_model_that_agrees_is_accepted(saved: Path) -> None:
    assert checkpoint_model(saved, tiny.MODEL, frozenset({"model"})) == tiny.MODEL
    assert checkpoint_model(saved, ModelConfig(hidden_size=32), frozenset({"model.hidden_size"})) == tiny.MODEL


@pytest.mark.parametrize(
    ("given", "overrides", "named"),
    [
        (replace(tiny.MODEL, hidden_size=64), {"model.hidden_size"}, "model.hidden_size=64 is not what .* has, 32"),
        (replace(tiny.MODEL, n_group=1), {"model"}, "model.n_group=1"),
        (replace(tiny.MODEL, index_topk=9), {"model"}, "model.index_topk=9"),
        (replace(tiny.MODEL, rope=RopeConfig(factor=4.0)), {"model.rope.factor"}, "model.rope.factor=4"),
        (replace(tiny.MODEL, index_n_heads=8), {"model.index_n_heads"}, "model.index_n_heads=8 differs"),
    ],
)
def test_a_model_that_differs_is_refused_by_field(
    given: ModelConfig, overrides: set[str], named: str, saved: Path
) -> None:
    with pytest.raises(UserError, match=named):
        checkpoint_model(saved, given, frozenset(overrides))


def test_the_tokenizer_is_the_checkpoints_or_trained_for_a_model_from_nothing(saved: Path, tmp_path: Path) -> None:
    assert default_tokenizer(None, tiny.MODEL) == "train:64"
    with pytest.raises(UserError, match="holds no tokenizer: give the one that it was trained with"):
        default_tokenizer(str(saved), tiny.MODEL)
    (tmp_path / "config.json").write_text(json.dumps({}))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert default_tokenizer(str(tmp_path), tiny.MODEL) == str(tmp_path)


def test_resolve_leaves_nothing_open_and_a_run_that_goes_on_keeps_its_start(saved: Path) -> None:
    asked = RunConfig("dense_warmup", "out", init_from=str(saved), data=DataConfig(tokenizer="bytes"))
    found = resolve(asked, NONE)
    assert found.model == tiny.MODEL
    assert found.optim.lr == STAGES["dense_warmup"].lr_narrow and found.optim.indexer_lr is None
    again = resolve(RunConfig("dense_warmup", "out"), NONE, stored=found)  # nothing under runs/ is asked for
    assert (again.init_from, again.model, again.data.tokenizer) == (str(saved), tiny.MODEL, "bytes")


def test_differences_name_the_keys_but_those_that_may_change() -> None:
    stored = RunConfig("pretrain", "out")
    changed = replace(
        stored,
        output_dir="moved",
        tracker=TrackerConfig(name="none"),
        train=replace(stored.train, steps=5, log_every=1, save_every=7, keep_checkpoints=9),
        rl=replace(stored.rl, judge_url="http://elsewhere/v1", judge_budget=9),
    )
    assert differences(stored, changed, MAY_CHANGE) == []
    changed = replace(changed, optim=OptimConfig(lr=0.5), data=DataConfig(seq_len=64))
    changed = replace(changed, rl=replace(changed.rl, judge_model="another"))
    assert differences(stored, changed, MAY_CHANGE) == [
        "data.seq_len=64 (was 512)",
        "optim.lr=0.5 (was None)",
        "rl.judge_model=another (was None)",
    ]
    changed = replace(stored, rl=RLConfig(domains={"math": DomainConfig(beta=0.1)}))
    keys = ["rl.domains.math.share", "rl.domains.math.beta"]
    assert differences(stored, changed, MAY_CHANGE) == [f"{keys[0]}=1.0 (was None)", f"{keys[1]}=0.1 (was None)"]
    assert differences(changed, stored, MAY_CHANGE) == [f"{keys[0]}=None (was 1.0)", f"{keys[1]}=None (was 0.1)"]


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def run_config(**fields: Any) -> RunConfig:
    return RunConfig(stage="pretrain", output_dir="run", **fields)


def test_the_backend_is_what_can_run_and_never_another_than_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    assert [op_settings(run_config(kernels="auto"), where).backend for where in (CPU, GPU)] == ["torch", "triton"]
    assert [op_settings(run_config(kernels="torch"), where).backend for where in (CPU, GPU)] == ["torch", "torch"]
    assert op_settings(run_config(kernels="triton"), GPU).backend == "triton"
    use = ": use kernels=auto or kernels=torch"
    with pytest.raises(
        UserError, match=f"kernels=triton cannot run here, its device is cpu and they need a CUDA GPU{use}"
    ):
        op_settings(run_config(kernels="triton"), CPU)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    with pytest.raises(UserError, match=f"its GPU has compute capability 7.5 and they need 8.0{use}"):
        op_settings(run_config(kernels="triton"), GPU)
    assert op_settings(run_config(kernels="auto"), GPU).backend == "torch"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"triton is not installed{use}"):
        op_settings(run_config(kernels="triton"), GPU)


def test_the_interpreter_runs_triton_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert op_settings(run_config(kernels="triton"), CPU).backend == "triton"
    assert op_settings(run_config(kernels="auto"), CPU).backend == "torch"


def test_the_workspace_is_the_devices_own_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    assert [op_settings(run_config(), where).workspace >> 20 for where in (CPU, GPU)] == [256, 2048]
    assert op_settings(run_config(ops=OpsConfig(workspace_mib=7)), GPU).workspace >> 20 == 7
