"""Log-probabilities of the target tokens by brute force: the whole [T, V] matrix of logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORE = -100


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    kept: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """hidden [T, D], weight [V, D], targets int64 [T] -> log softmax(hidden @ weight.T / temperature)[t, targets[t]],
    [T], in nats, over the words kept[t] alone where there are any.

    0 where the target is -100.
    """
    ignored = targets == IGNORE
    logits = hidden @ weight.T / temperature
    for t, words in enumerate(kept or ()):
        out = [v for v in range(len(weight)) if words and v not in words]
        logits[t, out] = -torch.inf
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, targets.masked_fill(ignored, 0)[:, None])[:, 0]
    return chosen.masked_fill(ignored, 0.0)
