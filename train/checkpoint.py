"""Checkpoints that are whole or not there: written under `.tmp_*`, synced, renamed; `latest` moves last.

    checkpoints/step_40/{state.json, rank_00000.safetensors, ...}   the form is train/shards.py's; no pickles
    checkpoints/latest                                              the name of the newest, for people and scripts

Any number of ranks, ZeRO stage, ep and cp reads what any other wrote.

A save is two things: `take` copies what this rank holds, in the step; `write` brings it to the disk, and may do so
while training goes on (train/saver.py). A kill at any moment leaves either the older set or the newer one, and at most
a `.tmp_*` that the next save removes.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.distributed import ProcessGroup

from conf.errors import UserError
from train import distributed, rng, shards
from train.engine_base import EngineBase

T = TypeVar("T")


@dataclass
class TrainState:
    """Where a run stands. `data_position`: global index of the next sequence; `guard`: see train/guards.py."""

    step: int = 0
    data_position: int = 0
    tokens: int = 0
    guard: dict[str, Any] = field(default_factory=dict)
    world_size: int = 1
    frozen: int = 0  # checksum of the weights that do not train, which checkpoints leave out
    steps_taken: int = 0  # by the optimiser
    sequences: int = 0  # that a step takes
    model: dict[str, Any] = field(default_factory=dict)  # ModelConfig
    files: list[dict[str, Any]] = field(default_factory=list)  # shards.Written of every rank
    extra: dict[str, Any] = field(default_factory=dict)  # of the loop


@dataclass(frozen=True)
class Taken:
    """What a rank saves of one step. All of it copies: the steps that follow change none of it."""

    state: TrainState
    tensors: dict[str, Tensor]  # name in the rank's file -> CPU tensor


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


def take(engine: EngineBase, state: TrainState, held: Mapping[str, Tensor] | None = None) -> Taken:
    """This rank's part of a checkpoint as it stands now, copied to CPU memory.

    Until it is written it takes that memory a second time: 12 bytes for each value that the rank holds under AdamW.
    `held`: what the rank's loop has beside the state, CPU tensors by name, that nobody changes any more.
    """
    state = copy.deepcopy(state)
    state.world_size, state.frozen, state.steps_taken = distributed.world_size(), engine.frozen, engine.steps_taken
    rank = distributed.rank()
    states = {f"rng.{rank}.{name}": value for name, value in rng.states().items()}
    states |= {f"held.{rank}.{name}": value for name, value in (held or {}).items()}
    return Taken(state, engine.state() | states)


def write(taken: Taken, run: Path, keep: int, group: ProcessGroup | None = None) -> None:
    """Writes `run/checkpoints/step_N`, and removes all but the `keep` newest; all ranks call it, and talk in `group`.

    UserError where a rank could not write (disk full): nothing of the new checkpoint is left, the older ones stay.
    """
    state, checkpoints = taken.state, run / "checkpoints"
    final, partial = checkpoints / f"step_{state.step}", checkpoints / f".tmp_step_{state.step}"
    main = distributed.rank() == 0

    def prepare() -> None:
        if main:
            for stale in checkpoints.glob(".tmp_step_*"):
                shutil.rmtree(stale)
            partial.mkdir(parents=True)

    def write_mine() -> shards.Written:
        return shards.write(partial, distributed.rank(), taken.tensors)

    def commit() -> None:
        if main:
            state.files = [each.plain() for each in files]
            (partial / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
            _sync_tree(partial)
            partial.rename(final)
            _sync(checkpoints)
            _point_latest(checkpoints, final.name)
            for old in list(step_folders(checkpoints).values())[:-keep]:
                _remove(old)

    _all(prepare, partial, group)
    files = _all(write_mine, partial, group)
    _all(commit, partial, group)


def _all(work: Callable[[], T], partial: Path, group: ProcessGroup | None) -> list[T]:
    """`work` on every rank -> what each returned. UserError on all of them where one met an OSError."""
    found, error = None, None
    try:
        found = work()
    except OSError as fault:
        error = f"{fault.strerror} ({fault.filename or partial})"
    answers = distributed.gather_objects((found, error), group)
    errors = [text for _, text in answers if text]
    if errors:
        if distributed.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        whole = newest(partial.parent.parent)
        kept = f"{whole} is whole" if whole else "there is no earlier one"
        raise UserError(f"the checkpoint could not be written: {errors[0]}; {kept}: make room and start again")
    return [cast(T, value) for value, _ in answers]


def refuse_other_world(checkpoint: Path) -> None:
    """UserError where another number of processes wrote it, for the loops whose steps depend on it."""
    wrote, here = read_state(checkpoint).world_size, distributed.world_size()
    if wrote != here:
        raise UserError(
            f"{checkpoint} was written by {wrote} process{'es' if wrote > 1 else ''} and this run has {here}:"
            f" start {wrote}, or give another output_dir"
        )


def open_shards(checkpoint: Path, state: TrainState) -> shards.Reader:
    """The checkpoint's tensors, after every file was compared with its checksum. UserError names what is wrong.

    The ranks share the files out for that; all of them call it.
    """
    files = [shards.Written(**each) for each in state.files]
    mine = files[distributed.rank() :: distributed.world_size()]
    found = distributed.gather_objects([fault for each in mine if (fault := shards.damage(checkpoint, each))])
    faults = [fault for part in found for fault in part]
    if faults:
        raise UserError(f"{faults[0]}: delete {checkpoint}, and the run goes on from the checkpoint before it")
    return shards.Reader(checkpoint, [each.name for each in files])


def restore(engine: EngineBase, checkpoint: Path) -> TrainState:
    """Loads the checkpoint into an engine of any layout. All ranks call it.

    Raises UserError where the frozen weights are not those that it was written beside, where it belongs to another
    model, and where a file is missing or damaged.
    """
    state = read_state(checkpoint)
    reader = open_shards(checkpoint, state)
    trained = engine.trained()
    if trained != reader.parameters():
        odd = sorted(trained ^ reader.parameters())[0]
        raise UserError(
            f"{checkpoint} belongs to another model or stage, {odd} is in one of them alone: give another run"
        )
    if state.frozen != engine.frozen:
        raise UserError(
            f"{checkpoint} belongs to other starting weights than init_from holds now: restore them, or give another"
            " output_dir"
        )
    engine.load(reader, state.steps_taken)
    if state.world_size == distributed.world_size():
        prefix = f"rng.{distributed.rank()}."
        keys = [key for key in reader.whole if key.startswith(prefix)]
        rng.restore({key.removeprefix(prefix): reader.tensor(key) for key in keys})
    return state


def read_held(checkpoint: Path) -> dict[str, Tensor]:
    """What this rank gave to `take` beside the state, where as many ranks wrote the checkpoint.

    `restore` has compared the files with their checksums."""
    reader = shards.Reader(checkpoint, [shards.file_name(distributed.rank())])
    prefix = f"held.{distributed.rank()}."
    return {key.removeprefix(prefix): reader.tensor(key) for key in reader.whole if key.startswith(prefix)}


def _point_latest(checkpoints: Path, name: str) -> None:
    partial = checkpoints / ".tmp_latest"
    partial.write_text(name + "\n", encoding="utf-8")
    _sync(partial)
    partial.replace(checkpoints / "latest")
    _sync(checkpoints)


def _remove(old: Path) -> None:
    """Out of the whole ones first: a kill in the middle leaves no half of a checkpoint under its name."""
    partial = old.with_name(f".tmp_{old.name}")
    old.rename(partial)
    shutil.rmtree(partial)


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
