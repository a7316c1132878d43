"""parallel.offload=nvme: equal to one plain process and to be resumed where DeepSpeed's async_io op can run, refused
with the reason where it cannot.

The op needs libaio's headers and a C++ compiler; CI has the second alone. With both (`apt install libaio-dev`) it is
compiled once for minutes, and the same test trains.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.utils.cpp_extension

import train.engine
from conf.schema import ParallelConfig
from tests.distributed import test_equal_to_one_process as plain
from tests.distributed.helper import run_ranks
from tests.train import runs
from train import distributed
from train.checkpoint import newest
from train.engine import import_deepspeed, no_nvme

LEAST = 1024  # bytes of a tensor that goes to disk, instead of 1 MiB: the tiny model has no larger ones


def nvme(folder: Path, **changes: object) -> ParallelConfig:
    fields = {"zero": 3, "persist_below": 0, "offload": "nvme", "nvme_path": str(folder / "nvme")}
    return ParallelConfig(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import_deepspeed()
    from deepspeed.runtime.swap_tensor import aio_config, optimizer_utils

    monkeypatch.setattr(optimizer_utils, "MIN_AIO_BYTES", LEAST)
    monkeypatch.setitem(aio_config.AIO_DEFAULT_DICT, "block_size", LEAST)


def on_disk(stage: str, kind: str, parallel: ParallelConfig) -> tuple[plain.Found, int]:
    """`plain.train` with how many of the optimiser's flat tensors lay on disk at the end."""
    held = []
    real = train.engine.Engine.step

    def step(self: train.engine.Engine, *args: object) -> None:
        real(self, *args)  # type: ignore[arg-type]
        flats = self._engine.optimizer.fp32_partitioned_groups_flat
        held.append(sum(flat.numel() == 0 for flat in flats))

    train.engine.Engine.step = step  # type: ignore[method-assign]  (this process alone)
    return plain.train(stage, kind, parallel), held[-1]


def refused(folder: Path, reason: str) -> None:
    line = f"UserError: parallel.offload=nvme cannot run here, {re.escape(reason)}: mend that or use .*=cpu"
    with pytest.raises(AssertionError, match=line):
        runs.go(runs.config(folder / "run", parallel=nvme(folder)), 2)
    assert not (folder / "run").exists()


@pytest.mark.parametrize("stage", ["dense_warmup", "sparse_adapt"])
def test_the_steps_of_one_plain_process_or_a_refusal(stage: str, tmp_path: Path, small_files: None) -> None:
    reason = no_nvme(tmp_path / "nvme")
    if reason is not None:
        return refused(tmp_path, reason)
    for kind in ("sgd", "adamw"):
        for ep, parameters in ((1, False), (2, True)):
            parallel = nvme(tmp_path, ep=ep, offload_parameters=parameters)
            for rank, (found, away) in enumerate(run_ranks(on_disk, 2, stage, kind, parallel)):
                plain.assert_equal(found, plain.reference(stage, kind), parallel, rank)
                assert away >= 3


def test_a_run_moves_between_disk_and_memory_or_is_refused(tmp_path: Path, small_files: None) -> None:
    reason = no_nvme(tmp_path / "nvme")
    if reason is not None:
        return refused(tmp_path, reason)
    places = {"memory": ParallelConfig(zero=3, persist_below=0), "disk": nvme(tmp_path, offload_parameters=True)}
    optim = runs.OptimConfig(warmup_steps=2, eps=1e-4)
    for name, places_in_turn in {"whole": ["memory"], "there": ["memory", "disk"], "back": ["disk", "memory"]}.items():
        for turn, place in enumerate(places_in_turn):
            config = runs.config(tmp_path / name, parallel=places[place], optim=optim)
            if turn < len(places_in_turn) - 1:
                with pytest.raises(AssertionError):
                    runs.go(config, 2, runs.die_at(17))  # in step 5
                assert newest(tmp_path / name) == tmp_path / name / "checkpoints/step_4"
            else:
                assert runs.go(config, 2) == ["finished"] * 2
    wanted = runs.rows(tmp_path / "whole")
    for name in ("there", "back"):
        for row, other in zip(runs.rows(tmp_path / name), wanted, strict=True):
            assert row["loss/lm"] == pytest.approx(other["loss/lm"], rel=2e-5)
            assert row["optim/grad_norm"] == pytest.approx(other["optim/grad_norm"], rel=2e-5)
        for key, value in runs.weights(tmp_path / "whole").items():
            assert float((runs.weights(tmp_path / name)[key] - value).norm()) <= 1e-4 * float(value.norm()), key
    left = [path.name for path in (tmp_path / "nvme").iterdir()]
    assert len(left) == 2, "a run that ends takes its files away; the one that was killed cannot"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert no_nvme(tmp_path / "file" / "nvme") == f"{tmp_path}/file/nvme cannot be written (Not a directory)"


def test_an_op_that_does_not_build_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_deepspeed()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    def load(*_: object, **__: object) -> None:
        raise RuntimeError("Error building extension 'async_io'\nthe compiler's words")

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda _: True)
    monkeypatch.setattr(AsyncIOBuilder, "load", load)
    assert no_nvme(tmp_path) == "DeepSpeed's async_io op cannot be built (Error building extension 'async_io')"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", None)
    assert "CUDA_HOME names none" in str(no_nvme(tmp_path))
    assert not list(tmp_path.iterdir())


def test_one_rank_without_the_op_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.engine, "no_nvme", lambda _: "the disk of rank 1 is away" if distributed.rank() else None)
    refused(tmp_path, "the disk of rank 1 is away")
