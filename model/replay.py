"""What a sampler did, for a trainer to repeat: Keep Routing (DeepSeek-V3.2, sec. 3.1) and the same for DSA's selection.

Only the *choice* is repeated. Gate values come from the live router's scores at the repeated experts, normalised over
them, so the gradient reaches the router; attention runs over the repeated positions. How often the live choice would
have been the sampler's is counted whether or not it is enforced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerReplay:
    """One layer's part of a `Replay`."""

    experts: Tensor | None
    selected: Tensor | None
    keep_routing: bool
    keep_selection: bool


@dataclass(frozen=True)
class Replay:
    """Of the rows of a packed sequence, by layer of the trunk.

    experts: [M, R, K] expert ids of each MoE layer; selected: [L, R, k] positions in the sequence, ascending, -1
    behind. A row whose first entry is -1 was not recorded: the live choice stands.
    """

    experts: Tensor | None = None
    selected: Tensor | None = None
    keep_routing: bool = True
    keep_selection: bool = True

    def layer(self, number: int, moe: int | None) -> LayerReplay:
        """Of layer `number`, which is the MoE layer `moe` (None: a dense MLP)."""
        experts = None if self.experts is None or moe is None else self.experts[moe]
        selected = None if self.selected is None else self.selected[number]
        return LayerReplay(experts, selected, self.keep_routing, self.keep_selection)


def repeat(live: Tensor, recorded: Tensor | None, keep: bool) -> Tensor:
    """The choice to go by, [R, n]: the recorded one where there is one and it is kept, else the live one."""
    if recorded is None or not keep:
        return live
    return torch.where(recorded[:, :1] >= 0, recorded.to(live.dtype), live)


def routes_agree(live: Tensor, recorded: Tensor) -> Tensor:
    """live, recorded [R, K] -> [2]: recorded rows whose experts are the same set, recorded rows."""
    known = recorded[:, 0] >= 0
    same = (live.sort(-1).values == recorded.to(live.dtype).sort(-1).values).all(-1)
    return torch.stack([(same & known).sum(), known.sum()])


def selection_overlap(live: Tensor, recorded: Tensor, visible: Tensor) -> Tensor:
    """live, recorded [R, k], visible [R] keys that a row sees -> [2] fp64: summed share of the recorded positions that
    the live selection has too, and the rows counted: those recorded ones that see more than k."""
    counted = (recorded[:, -1] >= 0) & (visible > recorded.shape[1])
    both = torch.cat([live[counted], recorded[counted].to(live.dtype)], -1).sort(-1).values
    common = (both[:, 1:] == both[:, :-1]).sum(-1)  # each is a set, so a number that stands twice is in both
    return torch.stack([common.double().sum() / recorded.shape[1], counted.sum().double()])
