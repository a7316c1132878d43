"""ZeRO-1 without DeepSpeed: a group of the optimiser as one flat tensor, of which each rank steps a share.

The model's parameters become views of the flat tensor and their gradients views of another, so what a backward adds
lies in its place already: one reduce-scatter brings a rank the sum of its share, one all-gather gives the weights back.
A rank keeps weights and gradients whole and 1 / ranks of AdamW's moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class FlatGroup:
    """`parameters` of fp32 with the same settings, shared out over the ranks of `group`, which hold the same ones.

    `mine`: this rank's share, for the optimiser; its `grad` is whole after `reduce`. `experts`: whether they are a part
    of the model's experts (their number is not that of the parameter).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup, experts: bool) -> None:
        ranks, self.group, self.experts = dist.get_world_size(group), group, experts
        self.parameters = list(parameters)
        first = self.parameters[0]
        assert all(p.dtype == torch.float32 for p in self.parameters)
        self.share = -(-sum(p.numel() for p in self.parameters) // ranks)
        self.start = dist.get_rank(group) * self.share
        self.flat = torch.zeros(ranks * self.share, device=first.device)
        self.gradients = torch.zeros_like(self.flat)
        for p, offset in self._offsets():
            place = slice(offset, offset + p.numel())
            self.flat[place].copy_(p.detach().reshape(-1))
            p.data = self.flat[place].view(p.shape)
            p.grad = self.gradients[place].view(p.shape)
        self.mine = nn.Parameter(self.flat.narrow(0, self.start, self.share))
        self.mine.grad = torch.zeros_like(self.mine)

    def _offsets(self) -> Iterator[tuple[nn.Parameter, int]]:
        offset = 0
        for p in self.parameters:
            yield p, offset
            offset += p.numel()

    def stretches(self) -> Iterator[tuple[nn.Parameter, int, int, int]]:
        """(parameter, start within it, offset within `mine`, length) of what this rank's share holds."""
        for p, offset in self._offsets():
            low, high = max(offset, self.start), min(offset + p.numel(), self.start + self.share)
            if low < high:
                yield p, low - offset, low - self.start, high - low

    def reduce(self) -> Tensor:
        """Sums this rank's share of the gradients over the ranks -> its squared norm, fp64."""
        assert self.mine.grad is not None
        dist.reduce_scatter_tensor(self.mine.grad, self.gradients, group=self.group)
        return torch.linalg.vector_norm(self.mine.grad, dtype=torch.float64) ** 2

    @torch.no_grad()
    def gather(self) -> None:
        """The parameters follow what the ranks have made of their shares."""
        dist.all_gather_into_tensor(self.flat, self.mine.detach().clone(), group=self.group)
