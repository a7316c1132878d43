"""The warm-up loss of one block of rows from its scores and its target: sums, statistics, dL/dI = softmax(I) - p."""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.common import Hidden, Scratch, select_topk


def new_sums(topk: int | None, like: Tensor) -> dict[str, Tensor]:
    names = ("kl", "kl_uniform", "rows", *(("mass", "oracle_mass") if topk is not None else ()))
    return {name: torch.zeros((), dtype=like.dtype, device=like.device) for name in names}


def selection_rows(scores: Tensor, p: Tensor, hidden: Hidden, topk: int, scratch: Scratch) -> Tensor:
    """What the top-k of `scores` is worth in each row, [3, rows]: p inside it, p inside the best possible selection,
    and the number of keys that both have. Arguments as `learn_block`; ties go to the lowest index in both."""
    rows, keys = p.shape
    chosen = select_topk(scores, topk)[0]
    seen = scratch("seen", rows, keys).copy_(p)
    best = select_topk(hidden.fill(seen, -torch.inf), topk)[0]
    marked = torch.zeros(rows * keys, dtype=torch.bool, device=p.device)
    marked[chosen] = True
    flat, found = p.view(-1), torch.zeros(3, rows, dtype=p.dtype, device=p.device)
    for place, at, worth in ((0, chosen, flat[chosen]), (1, best, flat[best]), (2, best, marked[best].to(p.dtype))):
        found[place].index_add_(0, at // max(keys, 1), worth)
    return found


def learn_block(
    sums: dict[str, Tensor], scores: Tensor, p: Tensor, hidden: Hidden, topk: int | None, scratch: Scratch
) -> Tensor:
    """Adds the rows' KL(p || softmax(scores)) to `sums` and returns its gradient by the scores, [rows, keys].

    Args: scores [rows, keys], -inf where hidden; p [rows, keys], 0 where hidden. The result lives in scratch "softmax".
    """
    log_student = hidden.fill(torch.log_softmax(scores, -1, out=scratch("softmax", *scores.shape)), 0.0)
    entropy = torch.xlogy(p, p, out=scratch("xlogy", *p.shape)).sum(-1)
    cross = torch.linalg.vecdot(p, log_student)
    sums["kl"] += (entropy - cross).sum()
    sums["rows"] += (hidden.count > 0).sum()
    sums["kl_uniform"] += (entropy + hidden.count.clamp(min=1).to(p.dtype).log())[hidden.count > 1].sum()
    if topk is not None:
        sums["mass"] += p.view(-1)[select_topk(scores, topk)[0]].sum()
        # hidden keys have p = 0, which adds nothing when it is selected
        sums["oracle_mass"] += p.view(-1)[select_topk(p, topk)[0]].sum()
    return hidden.fill(log_student.exp_(), 0.0).sub_(p)
