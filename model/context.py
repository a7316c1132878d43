"""The rows of a packed sequence that a forward computes, and how they see the rest of it.

Attention reads keys of the whole sequence; everything else works row by row. So one process that holds a slice of the
sequence needs three things from the others: the keys (`gather`), sums over a document that straddles slices (`add`),
and where its rows stand (`q_pos`). This class is the whole sequence on one process; context parallelism
(`train/parallel/cp.py`) is another one, and the model does not know which it was handed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.common import positions


class Context:
    """Attributes: doc_start [R] first position that each row may see; q_pos [R] position of each row in the sequence
    (None: 0, 1, 2, ...); real [R] whether a row is no padding; document [R] number of each row's document in the
    sequence (of padding: any); lengths [N] fp32, real rows of each document of the whole sequence."""

    def __init__(self, doc_start: Tensor, q_pos: Tensor | None, document: Tensor, lengths: Tensor) -> None:
        self.doc_start, self.q_pos, self.document, self.lengths = doc_start, q_pos, document, lengths
        self.real = doc_start <= positions(doc_start, q_pos)

    @classmethod
    def whole(cls, doc_start: Tensor) -> Context:
        """The sequence with this `doc_start` [T], all of it here."""
        return cls(doc_start, None, *documents(doc_start))

    def gather(self, x: Tensor) -> Tensor:
        """[R, ...] of these rows -> [T, ...] of the sequence, in its order; differentiable."""
        return x

    def add(self, x: Tensor) -> Tensor:
        """The sum of `x` over the processes that share the sequence; without gradient."""
        return x


def documents(doc_start: Tensor) -> tuple[Tensor, Tensor]:
    """doc_start [T] of a whole sequence -> (number of each row's document [T], rows of each document [N] fp32)."""
    real = doc_start <= torch.arange(doc_start.shape[0], device=doc_start.device)
    _, document = torch.unique_consecutive(doc_start, return_inverse=True)
    return document, torch.bincount(document, weights=real.float()).float()
