"""What a model loses, and what its indexer finds, by how much context a token has.

A row at position p of its document attends to p + 1 tokens, itself included: that number is its `context`, and buckets
of it are cut at powers of two (and at index_topk, up to which sparse attention keeps everything). A document that the
packing cut goes on as one of its own, as attention sees it.

Held are sums a sequence and bucket, in fp64, so intervals can be taken over sequences afterwards, and ranks (and those
that share a sequence) add up to the same result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model import ForwardOutput
from model.context import Context
from train import distributed
from train.intervals import LEVEL, mean_interval

WORTH = 3  # of a selection: attention inside it, inside the best possible one, share of its keys that this one has too
Row = dict[str, float | int | None]


def bucket_ends(longest: int, topk: int, first: int = 16, per_octave: int = 1) -> list[int]:
    """The largest context of every bucket, ascending, `longest` last: up to `first`, then `per_octave` buckets for each
    doubling, with an end at `topk`."""
    steps = range(math.ceil(math.log2(max(longest / first, 1)) * per_octave) + 1)
    ends = {min(round(first * 2 ** (step / per_octave)), longest) for step in steps}
    return sorted(ends | {longest} | ({topk} if topk < longest else set()))


class ByPosition:
    """Sums over the sequences that this rank has a part in; `reduce` makes them those of all ranks.

    ends: see `bucket_ends`; topks: sizes of the selections whose worth is kept, the model's own first.
    """

    def __init__(self, ends: list[int], num_sequences: int, layers: int, topks: tuple[int, ...], where: torch.device):
        self.ends, self.topks, self.layers = ends, topks, layers
        self.bounds = torch.tensor(ends, device=where)
        self.shape = (num_sequences, len(ends))
        self.losses: dict[str, Tensor] = {}  # name -> [N, buckets] sums over tokens, nats
        self.tokens = self._zeros(*self.shape)
        self.rows = self._zeros(len(ends))
        self.worth = self._zeros(layers, len(topks), WORTH, len(ends))
        self.most = self._zeros(2)  # of |sparse - dense| of a token within topk: the sum, the largest

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.bounds.device)

    def bucket(self, positions: Tensor) -> Tensor:
        return torch.bucketize(positions + 1, self.bounds)

    def add_loss(self, name: str, index: int, batch: Mapping[str, Tensor], logprobs: Tensor) -> None:
        """logprobs [R] of the labels of sequence `index`, as a model under `name` gave them."""
        held = self.losses.setdefault(name, self._zeros(*self.shape))
        target = batch["labels"] >= 0
        held[index].index_add_(0, self.bucket(batch["positions"][target]), -logprobs[target].double())

    def add_sequence(
        self, index: int, batch: Mapping[str, Tensor], context: Context, dense: ForwardOutput, sparse: ForwardOutput
    ) -> None:
        """What dense attention (with `row_topk=self.topks`) and sparse attention said of one sequence."""
        assert dense.token_logprobs is not None and sparse.token_logprobs is not None
        target = batch["labels"] >= 0
        at = self.bucket(batch["positions"])
        self.tokens[index].index_add_(0, at[target], torch.ones_like(at[target], dtype=torch.float64))
        self.add_loss("dense", index, batch, dense.token_logprobs)
        self.add_loss("sparse", index, batch, sparse.token_logprobs)
        same = target & (batch["positions"] < self.topks[0])
        if same.any():
            apart = (dense.token_logprobs - sparse.token_logprobs)[same].double().abs()
            self.most += torch.stack([apart.sum(), torch.zeros_like(apart.sum())])
            self.most[1] = torch.maximum(self.most[1], apart.max())
        real = context.real
        self.rows.index_add_(0, at[real], torch.ones_like(at[real], dtype=torch.float64))
        by_row = dense.stats["by_row"][: self.layers, ..., real].double()  # MTP's indexer is left out
        seen = batch["positions"][real] + 1
        for place, topk in enumerate(self.topks):
            by_row[:, place, 2] /= seen.clamp(max=topk)
        self.worth.index_add_(3, at[real], by_row)

    def reduce(self) -> None:
        """All ranks call it once, after the last sequence; ranks that had none take part."""
        names = sorted({name for rank in distributed.gather_objects(sorted(self.losses)) for name in rank})
        self.losses = {name: self.losses.get(name, self._zeros(*self.shape)) for name in names}
        parts = [self.tokens, self.rows, self.worth, self.most[:1], *self.losses.values()]
        flat = distributed.sum_over_ranks(torch.cat([part.flatten() for part in parts]))
        sums = [new.view(old.shape) for new, old in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]
        self.tokens, self.rows, self.worth, total, *losses = (part.cpu() for part in sums)
        self.losses = dict(zip(names, losses, strict=True))
        self.most = torch.tensor([float(total), distributed.max_over_ranks(float(self.most[1]))], dtype=torch.float64)


@dataclass(frozen=True)
class Report:
    """`ByPosition`, reduced, as rows of plain numbers."""

    sums: ByPosition

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """Context from, to, of every bucket."""
        return list(zip([1, *(end + 1 for end in self.sums.ends)], self.sums.ends, strict=False))

    @property
    def filled(self) -> list[int]:
        """Buckets in which there are tokens."""
        return [i for i in range(len(self.sums.ends)) if float(self.sums.tokens[:, i].sum()) > 0]

    def loss(self) -> list[Row]:
        """A row a bucket: mean losses with their intervals, and paired differences with an interval of their own and
        one that holds for all buckets at once (Bonferroni). `other`: of the checkpoint compared with."""
        rows = []
        for i in self.filled:
            tokens = self.sums.tokens[:, i]
            low, high = self.buckets[i]
            row: Row = {"from": low, "to": high, "tokens": int(tokens.sum()), "sequences": int((tokens > 0).sum())}
            for name in ("dense", "sparse", "other"):
                if name in self.sums.losses:
                    found = mean_interval(self.sums.losses[name][:, i], tokens)
                    row |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
            row |= self.difference(slice(i, i + 1), "sparse", "dense")
            if "other" in self.sums.losses:
                row |= self.difference(slice(i, i + 1), "sparse", "other", "against_")
            rows.append(row)
        return rows

    def difference(self, buckets: slice, mine: str, theirs: str, prefix: str = "") -> Row:
        """The loss of `mine` less that of `theirs` on the same tokens of these buckets, nats a token."""
        left = (self.sums.losses[mine] - self.sums.losses[theirs])[:, buckets].sum(1)
        tokens = self.sums.tokens[:, buckets].sum(1)
        own = mean_interval(left, tokens)
        every = mean_interval(left, tokens, 1 - (1 - LEVEL) / max(len(self.filled), 1))
        row: Row = {f"{prefix}difference": own.mean, f"{prefix}low": own.low, f"{prefix}high": own.high}
        return row | {f"{prefix}low_all": every.low, f"{prefix}high_all": every.high}

    def parity(self, short_context: int) -> Row:
        """The same for all tokens with little context, and how far a token is off where the two must be equal."""
        buckets = [i for i in self.filled if self.sums.ends[i] <= short_context] or self.filled[:1]
        stop = buckets[-1] + 1 if buckets else 0
        within = [i for i in self.filled if self.sums.ends[i] <= self.sums.topks[0]]
        tokens = float(self.sums.tokens[:, within].sum())
        row: Row = {
            "topk": self.sums.topks[0],
            "up_to": self.sums.ends[stop - 1],
            "tokens": int(self.sums.tokens[:, :stop].sum()),
        }
        row |= self.difference(slice(0, stop), "sparse", "dense")
        of_token = {"mean": float(self.sums.most[0]) / max(tokens, 1.0), "largest": float(self.sums.most[1])}
        return row | {f"within_topk_{name}_token": value for name, value in of_token.items()}

    def recall(self) -> list[Row]:
        """A row a layer and bucket, of the model's own index_topk."""
        rows: list[Row] = []
        for layer in range(self.sums.layers):
            for i, (low, high) in enumerate(self.buckets):
                if float(self.sums.rows[i]) > 0:
                    row: Row = {"layer": layer, "from": low, "to": high, "rows": int(self.sums.rows[i])}
                    rows.append(row | self._worth(slice(layer, layer + 1), 0, [i]))
        return rows

    def by_topk(self) -> list[Row]:
        """Rows for every selection size that was run: its loss against dense attention's, and its worth over all
        layers; first of all buckets together (`all` 1), then of each. At least one bucket must be filled."""
        rows = []
        for place, topk in sorted(enumerate(self.sums.topks), key=lambda pair: pair[1]):
            name = "sparse" if place == 0 else f"sparse@{topk}"
            for number, which in enumerate([self.filled, *([i] for i in self.filled)]):
                row: Row = {"k": topk, "from": self.buckets[which[0]][0], "to": self.buckets[which[-1]][1]}
                row["all"] = int(number == 0)
                row |= self.difference(slice(which[0], which[-1] + 1), name, "dense")
                rows.append(row | self._worth(slice(None), place, which))
        return rows

    def _worth(self, layers: slice, place: int, buckets: list[int]) -> Row:
        worth = self.sums.worth[layers, place][..., buckets]
        mass, oracle, overlap = worth.sum((0, 2)).tolist()
        rows = max(float(self.sums.rows[buckets].sum()) * len(worth), 1.0)
        return {
            "mass_recall": mass / rows,
            "recall_of_oracle": mass / max(oracle, 1e-30),
            "overlap": overlap / rows,
        }
