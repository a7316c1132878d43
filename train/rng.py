"""Random states of a process (torch, CUDA, Python, numpy) as tensors, for checkpoints. Nothing in the stages draws from
them today; what a user adds does."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor


def states() -> dict[str, Tensor]:
    """Name -> state of every generator of this process."""
    _, inner, _ = random.getstate()
    legacy = np.random.get_state(legacy=False)["state"]
    found = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(inner, dtype=torch.int64),
        "numpy": torch.from_numpy(np.append(legacy["key"].astype(np.int64), legacy["pos"])),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def restore(states: dict[str, Tensor]) -> None:
    """Sets the generators to what `states` returned."""
    torch.set_rng_state(states["torch"])
    random.setstate((3, tuple(states["python"].tolist()), None))
    key, position = states["numpy"][:-1].numpy().astype(np.uint32), int(states["numpy"][-1])
    np.random.set_state(("MT19937", key, position, 0, 0.0))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
