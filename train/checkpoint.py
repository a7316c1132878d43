"""Checkpoints that are whole or not there: written under `.tmp_*`, synced, renamed; `latest` moves last.

    checkpoints/step_40/{state.json, state/...}   state.json is ours, state/ DeepSpeed's (pickles: load only your own)
    checkpoints/latest                            the name of the newest, for people and scripts

A kill at any moment leaves either the older set or the newer one, and at most a `.tmp_*` that the next save removes.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conf.errors import UserError
from train import distributed
from train.engine import Engine


@dataclass
class TrainState:
    """Where a run stands. `data_position`: global index of the next sequence; `guard`: see train/guards.py."""

    step: int = 0
    data_position: int = 0
    tokens: int = 0
    guard: dict[str, Any] = field(default_factory=dict)
    world_size: int = 1
    frozen: int = 0  # checksum of the weights that do not train, which checkpoints leave out
    extra: dict[str, Any] = field(default_factory=dict)  # of the RL loop


def step_folders(checkpoints: Path) -> dict[int, Path]:
    """Step -> folder of every whole checkpoint, ascending."""
    found = {}
    for path in checkpoints.glob("step_*"):
        number = path.name.removeprefix("step_")
        if number.isdecimal() and (path / "state.json").is_file():
            found[int(number)] = path
    return dict(sorted(found.items()))


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run's folder."""
    found = step_folders(run / "checkpoints")
    return found[max(found)] if found else None


def read_state(checkpoint: Path) -> TrainState:
    return TrainState(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))


def save(engine: Engine, run: Path, state: TrainState, keep: int) -> None:
    """Writes `run/checkpoints/step_N`; all ranks call it. An existing checkpoint of that step is kept as it is."""
    checkpoints = run / "checkpoints"
    final, partial = checkpoints / f"step_{state.step}", checkpoints / f".tmp_step_{state.step}"
    if final.exists():
        return
    main = distributed.rank() == 0
    if main:
        for stale in checkpoints.glob(".tmp_step_*"):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
    distributed.barrier()
    engine.save(partial)
    distributed.barrier()
    if main:
        (partial / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
        _sync_tree(partial)
        partial.rename(final)
        _sync(checkpoints)
        _point_latest(checkpoints, final.name)
        for old in list(step_folders(checkpoints).values())[:-keep]:
            shutil.rmtree(old)
    distributed.barrier()


def refuse_other_world(checkpoint: Path) -> None:
    """UserError where another number of processes wrote it: DeepSpeed's state is cut into as many parts."""
    wrote, here = read_state(checkpoint).world_size, distributed.world_size()
    if wrote != here:
        raise UserError(
            f"{checkpoint} was written by {wrote} process{'es' if wrote > 1 else ''} and this run has {here}:"
            f" start {wrote}, or give another output_dir"
        )


def restore(engine: Engine, checkpoint: Path) -> TrainState:
    """Loads the checkpoint into an engine built as the one that wrote it.

    Raises UserError where the frozen weights are not those that it was written beside.
    """
    state = read_state(checkpoint)
    if state.frozen != frozen_checksum(engine.net):
        raise UserError(
            f"{checkpoint} belongs to other starting weights than init_from holds now: restore them, or give another"
            " output_dir"
        )
    engine.load(checkpoint)
    return state


@torch.no_grad()
def frozen_checksum(net: nn.Module) -> int:
    """Sum of the bit patterns of all fp32 weights that do not train: changed weights change it."""
    total = 0
    for p in net.parameters():
        if not p.requires_grad and p.dtype == torch.float32:
            total += int(p.detach().contiguous().view(torch.int32).sum(dtype=torch.int64))
    return total


def _point_latest(checkpoints: Path, name: str) -> None:
    partial = checkpoints / ".tmp_latest"
    partial.write_text(name + "\n", encoding="utf-8")
    _sync(partial)
    partial.replace(checkpoints / "latest")
    _sync(checkpoints)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)
