"""ZeRO-3 while a model is filled: every rank reads and keeps its share of each parameter alone.

A parameter is cut as soon as it has memory: the whole of it is reserved, the rank's stretch is written, DeepSpeed
copies that stretch, and the rest, of which no page was ever touched, is given back. So a rank's peak is its share of
the model and one tensor. DeepSpeed's own way (`zero.Init` around a built module) has rank 0 broadcast every tensor
whole; the two methods used here are what it calls around that broadcast (private, checked with 0.19.8, the pinned one).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import OptimConfig, ParallelConfig
from train import distributed
from train.ds_config import ds_config


def is_cut(p: Any) -> bool:
    return hasattr(p, "ds_tensor")


def full_shape(p: Any) -> torch.Size:
    """Shape of a parameter as the model sees it, cut or not (of experts: of those that this rank's group holds)."""
    return p.ds_shape if is_cut(p) else p.shape


def stretch(p: Any) -> tuple[int, int]:
    """(start, length) of what this rank keeps of a parameter that ZeRO-3 cuts, flat."""
    size = p.aligned_size() // p.ds_zero_partition_world_size
    start = min(p.ds_zero_partition_rank * size, p.ds_numel)
    return start, min(size, p.ds_numel - start)


def held(p: Any) -> Tensor:
    """The values of a parameter that this rank keeps, flat: all of them where it was not cut."""
    return p.ds_tensor.narrow(0, 0, stretch(p)[1]) if is_cut(p) else p.detach().reshape(-1)


class Zero3:
    """Cuts parameters over the ranks while `model.fill` gives them their values; a `model.fill.Share`.

    All ranks cut the same parameters in the same order.
    """

    def __init__(self, optim: OptimConfig, parallel: ParallelConfig) -> None:
        from train.engine import import_deepspeed

        deepspeed = import_deepspeed()
        deepspeed.init_distributed(verbose=False)  # finds the process group that is up
        config = ds_config(optim, parallel, 1, distributed.world_size())  # of which it reads where parameters go
        self._init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config, dtype=torch.float32)

    def begin(self, p: nn.Parameter) -> tuple[int, int]:
        """(start, length) of what this rank keeps of the flat parameter, which has its memory but no values yet."""
        self._init._convert_to_deepspeed_param(p)
        return stretch(p)

    def end(self, p: nn.Parameter) -> None:
        """Keeps what `begin` named and lets the rest go."""
        p.partition()  # type: ignore[attr-defined]
        p.data = torch.empty(0, dtype=p.dtype, device=distributed.device())
