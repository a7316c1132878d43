"""Under ZeRO-3 a rank reads and holds its share of a model while it loads, never the whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from model import Transformer, from_pretrained, save_pretrained
from tests.distributed.loading import MODEL, WORLD

ROOT = Path(__file__).resolve().parents[2]
SLACK = 1.3  # a rank may hold its share x 1.3 and the largest tensor


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[dict[str, Any]]], Transformer]:
    net = Transformer(MODEL)
    net.init_weights(0)
    folder = str(tmp_path_factory.mktemp("large") / "hf")
    save_pretrained(net, folder, torch.bfloat16)
    command = [sys.executable, "-m", "tests.distributed.loading", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1]), from_pretrained(folder)


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("source", ["checkpoint", "nothing"])
def test_a_rank_holds_its_share_and_one_tensor(source: str, ep: int, measured: tuple[dict, Transformer]) -> None:
    found, net = measured[0][f"{source}-ep{ep}"], measured[1]
    values = sum(p.numel() for p in net.parameters())
    largest = 4 * max(p.numel() for p in net.parameters())
    for each in found:
        assert each["kept"] == pytest.approx(values / WORLD, rel=0.01)
        assert each["bytes"] <= SLACK * 4 * values / WORLD + largest, each
    if source == "checkpoint":
        # whole rows are read: at most two of a tensor are not the rank's alone
        assert values <= sum(each["read"] for each in found) <= 1.02 * values
        total = sum(float(p.detach().double().sum()) for p in net.parameters())
        assert sum(each["sum"] for each in found) == pytest.approx(total, rel=1e-9, abs=1e-3)


def test_without_zero_3_every_rank_holds_the_whole(measured: tuple[dict, Transformer]) -> None:
    """What the bound above would not let pass."""
    whole = 4 * sum(p.numel() for p in measured[1].parameters())
    assert min(each["bytes"] for each in measured[0]["whole"]) >= 0.9 * whole
