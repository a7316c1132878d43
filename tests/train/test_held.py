"""What a loop keeps in the checkpoint beside the state: each rank gets back its own tensors, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from conf.errors import UserError
from tests.distributed.helper import run_ranks
from tests.train.test_disk import make_engine
from train import checkpoint, distributed
from train.checkpoint import TrainState
from train.saver import Saver


def of_rank(rank: int) -> dict[str, Tensor]:
    """Every kind of value that is kept, some without a value; the names are not the same everywhere."""
    found = {
        "bytes": torch.frombuffer(bytearray(f"rank {rank}\n\0".encode()), dtype=torch.uint8),
        "experts": torch.arange(-3, 9 + rank, dtype=torch.int16),
        "nothing": torch.zeros(0, dtype=torch.int32),
        "logprobs": torch.tensor([-0.1, float("nan"), -0.0, 1e-300], dtype=torch.float64),
    }
    return found | ({"rng": torch.ones(2, 3, dtype=torch.bool)} if rank else {})


def _save_and_read(run: Path, background: bool) -> None:
    engine, mine = make_engine(), of_rank(distributed.rank())
    saver = Saver(run, 3, background)
    saver.save(engine, TrainState(step=1), mine)
    saver.save(engine, TrainState(step=2))
    saver.wait()
    first = run / "checkpoints/step_1"
    assert checkpoint.restore(engine, first).step == 1
    found = checkpoint.read_held(first)
    assert found.keys() == mine.keys()
    for name, value in mine.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert found[name].numpy().tobytes() == value.numpy().tobytes(), name
    assert checkpoint.read_held(run / "checkpoints/step_2") == {}


@pytest.mark.parametrize("background", [True, False])
def test_each_rank_gets_back_its_own(background: bool, tmp_path: Path) -> None:
    run_ranks(_save_and_read, 2, tmp_path / "run", background)


def _restore(run: Path) -> None:
    checkpoint.restore(make_engine(), run / "checkpoints/step_1")


def test_damage_in_it_is_found_before_it_is_read(tmp_path: Path) -> None:
    run_ranks(_save_and_read, 2, tmp_path / "run", False)
    path = tmp_path / "run/checkpoints/step_1/rank_00001.safetensors"
    content = path.read_bytes()
    assert content.count(b"rank 1\n\0") == 1
    path.write_bytes(content.replace(b"rank 1\n\0", b"rank 2\n\0"))
    with pytest.raises(AssertionError, match=f"{UserError.__name__}: .*does not have the checksum"):
        run_ranks(_restore, 2, tmp_path / "run")
