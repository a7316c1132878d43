"""The policy whole on this rank, for rollouts where ZeRO-3 or expert parallelism have cut the trainer's, and for those
that run beside an update.

Ranks decode different prompts of different lengths, so they cannot meet in a layer. Before every rollout the copy
gathers the weights, tensor by tensor; it has no MTP module. A rank must hold the model once for it, in the parameters'
fp32.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from conf.schema import ModelConfig
from model import Transformer
from model.ops.settings import OpSettings
from train.engine import Engine


class RolloutCopy:
    """`net` is the copy; its weights are nothing before the first `refresh`. `step`: the iteration it is of."""

    def __init__(self, config: ModelConfig, ops: OpSettings, device: torch.device) -> None:
        with torch.device(device):
            self.net = Transformer(replace(config, num_nextn_predict_layers=0)).requires_grad_(False)
        self.net.use(ops)
        self.step: int | None = None

    @torch.no_grad()
    def refresh(self, engine: Engine, step: int) -> None:
        """Takes over the trainer's weights as they stand after iteration `step`, once; all ranks call it."""
        if self.step == step:
            return
        self.step = step
        for name, mine in self.net.state_dict().items():
            if ".mlp.experts." in name:
                for expert, part in enumerate(mine):
                    part.copy_(engine.whole(name, expert))
            else:
                mine.copy_(engine.whole(name))
