"""What a run starts from: `init_from`, the architecture that it sets, the learning rates, the tokenizer.

Everything that the user may leave out is filled in here and then stands in `config.yaml`. A run that goes on takes what
was filled in from there, so that a newer finished run under `runs/` does not become its start halfway.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from conf.convert import redacted, to_dict
from conf.errors import UserError
from conf.schema import ModelConfig, ParallelConfig, RunConfig
from conf.validate import flatten
from model.ops.settings import OpSettings
from train import distributed
from train.precision import fp8_backend
from train.stages import STAGES, Stage, resolve_rates

RUNS = Path("runs")
WORKSPACE_MIB = {"cpu": 256, "cuda": 2048}  # a GPU needs larger chunks to fill it
MAY_DIFFER = ("index_n_heads", "index_head_dim", "index_topk", "mtp")  # from the checkpoint that init_from names


def resolve(config: RunConfig, overrides: frozenset[str], stored: RunConfig | None = None) -> RunConfig:
    """The run with nothing left open. `overrides`: what the user set; `stored`: the run that goes on in `output_dir`.

    Raises UserError with one line: no start is found, or the user's model is not the checkpoint's.
    """
    stage = STAGES[config.stage]
    init_from = config.init_from
    if init_from is None:
        init_from = stored.init_from if stored is not None else default_start(stage)
    own_model = any(key == "model" or key.startswith("model.") for key in overrides)
    if init_from is None:
        model = config.model
    elif stored is not None and stored.init_from == init_from and not own_model:
        model = stored.model
    else:
        model = checkpoint_model(weights_folder(init_from), config.model, overrides)
    data = config.data
    if data.tokenizer == "auto":
        spec = stored.data.tokenizer if stored is not None else default_tokenizer(init_from, model)
        data = replace(data, tokenizer=spec)
    optim = resolve_rates(stage, config.optim, model.hidden_size)
    return replace(config, init_from=init_from, model=model, data=data, optim=optim)


def op_settings(config: RunConfig, device: torch.device) -> OpSettings:
    """How the ops run on `device`: kernels=auto is triton where it can run, and torch elsewhere.

    UserError where kernels=triton cannot run. conf/validate.py refuses cudnn.
    """
    ops, hindrance = config.ops, no_triton(device)
    if config.kernels == "triton" and hindrance is not None:
        raise UserError(f"kernels=triton cannot run here, {hindrance}: use kernels=auto or kernels=torch")
    backend = config.kernels
    if backend == "auto":
        backend = "torch" if hindrance is not None or device.type != "cuda" else "triton"
    workspace = ops.workspace_mib or WORKSPACE_MIB[device.type]
    fp8_linear = fp8_backend(config.precision.name, device)
    return OpSettings(backend, workspace << 20, ops.deterministic, ops.fp8_index, fp8_linear)


def check_offload(parallel: ParallelConfig) -> None:
    """UserError on all ranks where one of them cannot write to parallel.nvme_path as DeepSpeed does."""
    if parallel.offload != "nvme":
        return
    from train.engine import no_nvme

    assert parallel.nvme_path is not None, "conf/validate.py comes first"
    reasons = [reason for reason in distributed.gather_objects(no_nvme(Path(parallel.nvme_path))) if reason]
    if reasons:
        raise UserError(f"parallel.offload=nvme cannot run here, {reasons[0]}: mend that or use parallel.offload=cpu")


def no_triton(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on `device`; None if they can. Under TRITON_INTERPRET=1 they run anywhere, some
    thousand times slower: for tests."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"its device is {device.type} and they need a CUDA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"its GPU has compute capability {major}.{minor} and they need 8.0"


def finished_runs(root: Path = RUNS) -> dict[Path, str]:
    """Run folder -> stage of every finished run (it has hf/) one or two levels under `root`, newest first."""
    found: dict[Path, tuple[float, str]] = {}
    for path in [*root.glob("*/config.yaml"), *root.glob("*/*/config.yaml")]:
        export = path.parent / "hf" / "config.json"
        if not export.is_file():
            continue
        first = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("stage:")]
        if first:
            found[path.parent] = (export.stat().st_mtime, first[0].removeprefix("stage:").strip())
    return {folder: stage for folder, (_, stage) in sorted(found.items(), key=lambda item: -item[1][0])}


def default_start(stage: Stage, root: Path = RUNS) -> str | None:
    """The newest finished run of the stages before, None for a stage that needs no start.

    UserError where there is no such run.
    """
    if not stage.previous:
        return None
    for folder, name in finished_runs(root).items():
        if name in stage.previous:
            return str(folder)
    before = " or ".join(stage.previous)
    raise UserError(
        f"init_from is not given and {root}/ holds no finished run of {before}: run +stage={stage.previous[0]} first,"
        " or give init_from=PATH, a Hugging Face folder or the output_dir of a run"
    )


def weights_folder(init_from: str, key: str = "init_from") -> Path:
    """`init_from` (a Hugging Face folder or a run's output_dir) -> the folder that holds config.json."""
    given = Path(init_from)
    for folder in (given, given / "hf"):
        if (folder / "config.json").is_file():
            return folder
    if not given.exists():
        raise UserError(f"{key}={init_from} does not exist: give a Hugging Face folder or the output_dir of a run")
    if (given / "config.yaml").is_file():
        raise UserError(f"{key}={init_from} is a run that has not finished (no hf/): let it finish first")
    raise UserError(f"{key}={init_from} holds no config.json and no hf/: give a Hugging Face folder or a run's")


def checkpoint_model(folder: Path, given: ModelConfig, overrides: frozenset[str]) -> ModelConfig:
    """The checkpoint's architecture with the user's `model.index_*` and `model.mtp`.

    Anything else that the user set (`model=preset`, `model.hidden_size=...`) must agree with it, or UserError names it.
    """
    from model.hf import read_config

    wanted = {key: getattr(given, key) for key in MAY_DIFFER if f"model.{key}" in overrides}
    found = read_config(folder, **wanted)
    mine, theirs = _flat(given), _flat(found)
    for key in mine:
        asked = "model" in overrides or f"model.{key}" in overrides
        if not asked or key in wanted or mine[key] == theirs.get(key, mine[key]):
            continue
        if key == "num_nextn_predict_layers" and given.num_mtp_layers == 0 or key == "mtp":
            continue
        raise UserError(
            f"model.{key}={mine[key]} is not what {folder / 'config.json'} has, {theirs[key]}: leave it out, only"
            f" {', '.join('model.' + name for name in MAY_DIFFER)} can differ"
        )
    return found


def _flat(model: ModelConfig) -> dict[str, Any]:
    values = asdict(model)
    rope = values.pop("rope")
    if rope["factor"] == 1.0:  # the rest is YaRN's and means nothing without it
        rope = {"theta": rope["theta"], "factor": 1.0}
    return values | {f"rope.{key}": value for key, value in rope.items()}


def default_tokenizer(init_from: str | None, model: ModelConfig) -> str:
    """The tokenizer of the checkpoint; for a run from nothing one trained on its corpus.

    UserError where the checkpoint has none.
    """
    if init_from is None:
        return f"train:{model.vocab_size}"
    folder = weights_folder(init_from)
    if (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file():
        return str(folder)
    raise UserError(f"{folder} holds no tokenizer: give the one that it was trained with, data.tokenizer=FOLDER")


def differences(stored: RunConfig, config: RunConfig, allowed: tuple[str, ...]) -> list[str]:
    """`key=new (was old)` for every setting that differs, but those in `allowed` and those under `allowed.`."""
    old, new = (_settings(redacted(run)) for run in (stored, config))
    free = tuple(f"{key}." for key in allowed)
    return [
        f"{key}={new.get(key)} (was {old.get(key)})"
        for key in new | old
        if new.get(key) != old.get(key) and key not in allowed and not key.startswith(free)
    ]


def _settings(run: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted key; of a domain those that it has of its own."""
    found = flatten(to_dict(run))
    for name, own in found.pop("rl.domains").items():
        found |= {f"rl.domains.{name}.{key}": value for key, value in own.items() if value is not None and value != ()}
    return found
