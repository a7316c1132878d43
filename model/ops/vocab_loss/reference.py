"""Log-probabilities of the target tokens by brute force: the whole [T, V] matrix of logits."""

from __future__ import annotations

from torch import Tensor

IGNORE = -100


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """hidden [T, D], weight [V, D], targets int64 [T] -> log softmax(hidden @ weight.T)[t, targets[t]], [T], in nats.

    0 where the target is -100.
    """
    ignored = targets == IGNORE
    logprobs = (hidden @ weight.T).log_softmax(dim=-1)
    chosen = logprobs.gather(1, targets.masked_fill(ignored, 0)[:, None])[:, 0]
    return chosen.masked_fill(ignored, 0.0)
