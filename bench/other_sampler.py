"""The GRPO stage with a sampler that is another model than the trainer's, as an inference engine with kernels and a
precision of its own is: every weight of a copy is multiplied by 1 + NOISE z, z normal and the same throughout the run.

    python -m bench.other_sampler NOISE +stage=grpo ...
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch

import rl.loop
from conf.load import load
from rl.messages import RolloutRequest, Sample
from rl.rollout.native import NativeEngine
from train import distributed
from train.run import open_run

NOISE = float(sys.argv[1]) if __name__ == "__main__" else 0.0


class OtherSampler(NativeEngine):
    """`NativeEngine` on a perturbed copy, made anew from the policy before every rollout."""

    def __init__(self, net: Any, *args: Any, **more: Any) -> None:
        super().__init__(copy.deepcopy(net).requires_grad_(False), *args, **more)
        self.policy = net

    @torch.no_grad()
    def generate(self, requests: Sequence[RolloutRequest], *args: Any, **more: Any) -> list[Sample]:
        generator = torch.Generator().manual_seed(0)
        self.net.load_state_dict(self.policy.state_dict())
        for weight in self.net.parameters():
            weight.mul_(1 + NOISE * torch.randn(weight.shape, generator=generator))
        return super().generate(requests, *args, **more)


if __name__ == "__main__":
    rl.loop.NativeEngine = OtherSampler  # type: ignore[misc]
    loaded = load(sys.argv[2:])
    with distributed.process_group():
        opened = open_run(loaded.config, loaded.overrides)
        if opened is not None:  # None: it has finished
            with opened as context:
                rl.loop.run(context)
