"""The words that a sampler left in the running for each token (top-p, top-k): Keep Sampling Mask (DeepSeek-V3.2, sec.
3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class KeptSets:
    """Word ids of each row in one list: row t keeps ids[offsets[t] : offsets[t + 1]]; none at all means every word.

    ids int64 [N], offsets int64 [T + 1].
    """

    def __init__(self, ids: Tensor, offsets: Tensor) -> None:
        self.ids, self.offsets = ids, offsets

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> KeptSets:
        rows = list(rows)
        sizes = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        ids = torch.tensor([word for row in rows for word in row], dtype=torch.int64)
        return cls(ids, torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]))

    def to(self, device: torch.device) -> KeptSets:
        return KeptSets(self.ids.to(device), self.offsets.to(device))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def rows(self, index: Tensor) -> KeptSets:
        """The sets of rows `index` [R], in that order."""
        sizes = (self.offsets[1:] - self.offsets[:-1])[index]
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        place = torch.arange(int(offsets[-1]), device=index.device) - offsets[:-1].repeat_interleave(sizes)
        return KeptSets(self.ids[self.offsets[index].repeat_interleave(sizes) + place], offsets)

    def dropped(self, words: slice) -> Tensor:
        """[T, words] bool: the words of a stretch of the vocabulary that are out of the running."""
        sizes = self.offsets[1:] - self.offsets[:-1]
        row = torch.arange(len(self), device=sizes.device).repeat_interleave(sizes)
        here = (self.ids >= words.start) & (self.ids < words.stop)
        out = (sizes > 0).unsqueeze(1).repeat(1, words.stop - words.start)
        out[row[here], self.ids[here] - words.start] = False
        return out
