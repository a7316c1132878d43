"""Rollouts on the trainer's own weights where ZeRO-3 or expert parallelism have cut them: for models of which no rank
can hold a whole copy.

A forward is then a meeting of all ranks, who gather a parameter or hand tokens to one another's experts. But each
decodes prompts of its own, of other lengths. So before every forward the ranks agree on its kind, the largest of what
each wants; whoever wants another, or is out of samples, runs a row of no meaning with them, and asks again. Prefill
goes first, so that all soon draw tokens together; nobody leaves before the longest sample is finished. A forward costs
one small collective more, and under ZeRO-3 each token the gathering of a whole model.
"""

from __future__ import annotations

import torch

from model import Transformer
from model.generate import Decoder
from train import distributed

KINDS = ("done", "head", "hidden")  # of forwards, see `model.generate.generate`; none is "done"


class LockStep:
    """The meetings of one run. All ranks make it, and generate at the same time."""

    def __init__(self, net: Transformer, attention: str) -> None:
        self.net, self.attention = net, attention

    def turn(self, kind: str) -> None:
        """Returns when it is the turn of `kind`, for the ranks that want it; all others run a row beside them."""
        while (now := KINDS[int(distributed.max_over_ranks(KINDS.index(kind)))]) != kind:
            self._run_empty(now)

    def finish(self) -> None:
        """This rank has no sample left: keeps the others company until nobody has."""
        self.turn("done")

    @torch.no_grad()
    def _run_empty(self, kind: str) -> None:
        device = distributed.device()
        if kind == "head":
            self.net.lm_head(torch.zeros(1, self.net.config.hidden_size, device=device))
        else:
            zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
            Decoder(self.net, 1, 1, self.attention).hidden(zero, zero)
