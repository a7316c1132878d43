"""The optimiser: who is in it, at which rate at which step, and how a step is left out.

The schedule is a pure function of the step, written into the parameter groups before every step, so there is nothing of
it to save. A rate depends on `train.steps` (the cosine ends there): a run extended by a larger `train.steps` follows
the longer cosine from where it goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from conf.schema import OptimConfig
from train.parallel.zero3 import full_shape
from train.stages import Stage


class SkippableAdamW(torch.optim.AdamW):
    """AdamW whose next step can be left out whole: parameters, moments and step count stay as they are.

    The guards need it under any ZeRO stage, where DeepSpeed calls `step` itself and clears the gradients afterwards.
    """

    skip_next = False

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        return None if self.skip_next else super().step(closure)


def select_trainable(net: nn.Module, stage: Stage) -> None:
    """Sets requires_grad to what the stage trains; the rest is frozen and never reaches the optimiser."""
    for name, p in net.named_parameters():
        p.requires_grad_(stage.trains_indexer if ".indexer." in name else stage.trains_trunk)


def parameter_groups(net: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters by role (trunk, indexer): matrices with weight decay, norms and biases without."""
    found: dict[tuple[str, bool, str], list[nn.Parameter]] = {}
    for name, p in net.named_parameters():
        if p.requires_grad:
            # DeepSpeed wants experts that ranks share out in groups of their own (train/parallel/ep.py)
            key = ("indexer" if ".indexer." in name else "trunk", len(full_shape(p)) > 1, getattr(p, "group_name", ""))
            found.setdefault(key, []).append(p)
    groups: list[dict[str, Any]] = []
    for role, matrix, shared in sorted(found, reverse=True):
        group = {"params": found[role, matrix, shared], "role": role, "weight_decay": weight_decay if matrix else 0.0}
        groups.append(group | ({"moe": True, "name": shared} if shared else {}))
    return groups


def build_optimizer(net: nn.Module, optim: OptimConfig, fused: bool = False) -> SkippableAdamW:
    """AdamW over what requires gradients; rates are set by `apply_rates` before every step.

    `fused`: one pass over the memory, several times as fast for steps on a CPU (docs/log.md).
    """
    groups = parameter_groups(net, optim.weight_decay)
    assert optim.lr is not None, "resolve_rates comes first"
    return SkippableAdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=fused or None)


def schedule(step: int, steps: int, optim: OptimConfig) -> float:
    """Share of the peak rate at `step` (0-based) of `steps`: linear warm-up from 1/warmup, then constant or cosine."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    span = max(1, steps - optim.warmup_steps)
    done = min(1.0, (step + 1 - optim.warmup_steps) / span)
    return optim.final_lr_share + (1.0 - optim.final_lr_share) * 0.5 * (1.0 + math.cos(math.pi * done))


def rates(step: int, steps: int, optim: OptimConfig) -> dict[str, float]:
    """The rate of each role at `step`. Where the stage trains one of them, both names carry its rate."""
    assert optim.lr is not None, "resolve_rates comes first"
    share = schedule(step, steps, optim)
    indexer = optim.lr if optim.indexer_lr is None else optim.indexer_lr
    return {"trunk": optim.lr * share, "indexer": indexer * share}


def apply_rates(optimizer: torch.optim.Optimizer, values: dict[str, float]) -> None:
    for group in optimizer.param_groups:
        group["lr"] = values[group["role"]]
