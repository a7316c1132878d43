"""Documents of an epoch -> sequences: which stretch of which document stands in sequence i. No tokens, only lengths.

Sequence i of a source is a pure function of (lengths, seq_len, seed, i). `Concat` lays the documents of an epoch in an
order of its own one after another and cuts every `seq_len` tokens; epochs follow without a gap. `BestFit` keeps whole
what fits: its plan (`data.best_fit`) is made once, an epoch draws which document of a length takes which place, and the
order of the sequences.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from data.best_fit import make_plan

KEPT_EPOCHS = 2  # orders held in memory: a sequence may span two epochs


class Span(NamedTuple):
    """Positions start .. end of a document."""

    document: int
    start: int
    end: int


class Figures(NamedTuple):
    """What an epoch comes to. `cut`: share of the documents no longer than a sequence that are in more than one."""

    sequences: float
    padding: float
    cut: float


class _Epochs:
    """The newest few of what is made for an epoch."""

    def __init__(self) -> None:
        self.kept: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def get(self, number: int, make: Callable[[int], tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        if number not in self.kept:
            self.kept[number] = make(number)
            while len(self.kept) > KEPT_EPOCHS:
                self.kept.popitem(last=False)
        return self.kept[number]


class Concat:
    """`lengths` int64 [documents of the source]; `chosen`: which of them make an epoch, as often as each occurs."""

    def __init__(self, lengths: np.ndarray, chosen: np.ndarray, seq_len: int, seed: int) -> None:
        self.lengths, self.chosen, self.seq_len, self.seed = lengths, chosen, seq_len, seed
        self.total = int(lengths[chosen].sum())
        self._epochs = _Epochs()

    def _epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents in order, where each starts in the epoch [documents + 1])."""
        order = self.chosen[np.random.default_rng([self.seed, number]).permutation(len(self.chosen))]
        return order, np.concatenate([[0], np.cumsum(self.lengths[order])])

    def spans(self, number: int) -> Iterator[Span]:
        """What stands in sequence `number`, in order: tokens [number * T, (number + 1) * T) of the epochs."""
        at, room = number * self.seq_len, self.seq_len
        while room:
            epoch, inside = divmod(at, self.total)
            order, starts = self._epochs.get(epoch, self._epoch)
            place = int(np.searchsorted(starts, inside, side="right")) - 1
            start = inside - int(starts[place])
            end = min(start + room, int(self.lengths[order[place]]))
            yield Span(int(order[place]), start, end)
            at, room = at + end - start, room - (end - start)

    def figures(self) -> Figures:
        order, starts = self._epochs.get(0, self._epoch)
        fits = self.lengths[order] <= self.seq_len
        cut = (starts[:-1] // self.seq_len != (starts[1:] - 1) // self.seq_len) & fits
        return Figures(self.total / self.seq_len, 0.0, float(cut.sum() / max(1, fits.sum())))


class BestFit:
    """As `Concat`. `max_cut`: share of the documents that fit which may be cut where padding would be above 2%."""

    def __init__(self, lengths: np.ndarray, chosen: np.ndarray, seq_len: int, seed: int, max_cut: float) -> None:
        self.seed, self.seq_len = seed, seq_len
        pieces = -(-lengths[chosen] // seq_len)  # of each document; all but the last are whole sequences
        document = np.repeat(chosen, pieces)
        number = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        start = number * seq_len
        length = np.minimum(lengths[document] - start, seq_len)
        falling = np.argsort(-length, kind="stable")
        self.document, self.start, self.length = document[falling], start[falling], length[falling]
        self.num_fitting = int((pieces == 1).sum())
        self.plan = make_plan(self.length, seq_len, int(max_cut * self.num_fitting))
        self._epochs = _Epochs()

    def _epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(the item that takes each rank, the order of the sequences)."""
        draw = np.random.default_rng([self.seed, number])
        items = np.lexsort((draw.random(len(self.length)), -self.length))
        return items, draw.permutation(self.plan.num_sequences)

    def spans(self, number: int) -> Iterator[Span]:
        plan = self.plan
        epoch, place = divmod(number, plan.num_sequences)
        items, order = self._epochs.get(epoch, self._epoch)
        begin, end = plan.first[order[place]], plan.first[order[place] + 1]
        for rank, inside, length in zip(
            plan.rank[begin:end].tolist(), plan.start[begin:end].tolist(), plan.length[begin:end].tolist(), strict=True
        ):
            item = items[rank]
            start = int(self.start[item]) + inside
            yield Span(int(self.document[item]), start, start + length)

    def figures(self) -> Figures:
        sequences = self.plan.num_sequences
        padding = 1 - int(self.length.sum()) / (sequences * self.seq_len)
        return Figures(sequences, padding, self.plan.num_cut / max(1, self.num_fitting))
