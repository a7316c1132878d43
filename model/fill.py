"""Gives a model on the meta device its values, one tensor at a time, in the order of its modules.

So a process that keeps a share of every parameter (ZeRO-3, `train/parallel/zero3.py`) never holds, nor reads, more than
its share and one tensor, however large the model is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from model.hf_names import stored_dtype

Write = Callable[[str, Tensor, int, int], None]  # (name, flat values, start, length) -> fills that stretch of them


class Share(Protocol):
    """What a process keeps of each parameter."""

    def begin(self, p: nn.Parameter) -> tuple[int, int]:
        """(start, length) of the flat parameter `p`, which has its memory and no values yet."""

    def end(self, p: nn.Parameter) -> None:
        """Its stretch has its values now."""


@torch.no_grad()
def fill(net: nn.Module, dtype: torch.dtype, write: Write, share: Share | None = None) -> None:
    """Writes every parameter and buffer of `net`. What is on the meta device is made on the CPU in `dtype` (routers and
    the indexer's small parts in fp32); what exists keeps its device and dtype. `share` cuts the parameters."""
    for name in net.state_dict(keep_vars=True):
        owner, _, leaf = name.rpartition(".")
        tensor = materialise(net.get_submodule(owner), leaf, stored_dtype(name, dtype))
        if share is None or not isinstance(tensor, nn.Parameter):
            write(name, tensor.detach().view(-1), 0, tensor.numel())
            continue
        start, length = share.begin(tensor)
        write(name, tensor.detach().view(-1), start, length)
        share.end(tensor)


def materialise(module: nn.Module, leaf: str, dtype: torch.dtype) -> Tensor:
    """The parameter or buffer `leaf`, with memory on the CPU if it was on the meta device; no values yet."""
    tensor = getattr(module, leaf)
    if not tensor.is_meta:
        return tensor
    empty = torch.empty(tensor.shape, dtype=dtype, device="cpu")
    made = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    vars(made).update(vars(tensor))  # marks that others left on it, such as the ranks that share an expert
    setattr(module, leaf, made)
    return made
