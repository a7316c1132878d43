"""Advantages inside a group: R - mean(R), as DeepSeek-V3.2 has it (arXiv 2512.02556, eq. 5); R1's division by the std
is an option.

A group whose rewards are all equal teaches nothing through the surrogate; it gets exact zeros (no rounding residue of
the mean) and is counted, because the share of such groups says when a task is too easy or too hard.
"""

from __future__ import annotations

from torch import Tensor


def group_advantages(rewards: Tensor, divide_by_std: bool = False) -> tuple[Tensor, Tensor]:
    """rewards [groups, G] -> (advantages [groups, G], zero_spread [groups] bool).

    With `divide_by_std`: (R - mean) / std over the group (population std; arXiv 2402.03300, sec. 4.1.2).
    """
    assert rewards.dim() == 2, f"rewards must be [groups, G], got {tuple(rewards.shape)}"
    zero_spread = rewards.amax(1) == rewards.amin(1)
    centred = rewards - rewards.mean(1, keepdim=True)
    if divide_by_std:
        centred = centred / centred.square().mean(1, keepdim=True).sqrt()
    return centred.masked_fill(zero_spread.unsqueeze(1), 0.0), zero_spread
