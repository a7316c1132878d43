"""Documents in, sequences of exactly T tokens out, with all that attention and the losses need to know about borders.

A document that does not fit into the room left is cut, and the rest opens the next sequence as a segment of its own.
Shifts (next token, the token after it for MTP) are made on the document before any cut, so they are right at borders:
the target of a segment's last token is known although the token itself lies in the next sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # a label that no loss counts


@dataclass
class PackedBatch:
    """One packed sequence; every field int64 [T]. Padding rows see nothing (doc_start T) and have no labels."""

    input_ids: Tensor
    next_ids: Tensor  # token t+1 of the same document, 0 where there is none
    labels: Tensor  # the same as a target: IGNORE where there is none or it is masked
    mtp_labels: Tensor  # token t+2 of the same document, IGNORE likewise
    positions: Tensor  # t - doc_start; 0 in padding
    doc_start: Tensor  # first position that t may see

    def tensors(self) -> dict[str, Tensor]:
        """Field name -> tensor: the model's data arguments."""
        return dict(vars(self))


class Piece(NamedTuple):
    """A stretch of one document inside one sequence."""

    ids: np.ndarray  # [length .. length + 2]: the stretch and as many of the next two tokens as the document has
    targets: np.ndarray | None  # bool, like ids: whether a loss may ask for this token; None: every one
    length: int

    @classmethod
    def cut(cls, ids: np.ndarray, targets: np.ndarray | None, start: int, end: int) -> Piece:
        """Positions start..end of a document; `ids` and `targets` are the whole document."""
        stop = end + 2
        return cls(ids[start:stop], None if targets is None else targets[start:stop], end - start)


def assemble(pieces: Iterable[Piece], seq_len: int) -> PackedBatch:
    """Lays pieces one after another and pads to `seq_len`. They must fit."""
    input_ids, next_ids = np.zeros(seq_len, np.int64), np.zeros(seq_len, np.int64)
    labels, mtp_labels = np.full(seq_len, IGNORE, np.int64), np.full(seq_len, IGNORE, np.int64)
    doc_start = np.full(seq_len, seq_len, np.int64)
    at = 0
    for ids, targets, length in pieces:
        end = at + length
        assert end <= seq_len, f"{end} tokens in a sequence of {seq_len}"
        goals = ids if targets is None else np.where(targets, ids, IGNORE)
        one, two = min(length, len(ids) - 1), max(0, min(length, len(ids) - 2))  # rows whose t+1, t+2 exist
        input_ids[at:end] = ids[:length]
        next_ids[at : at + one] = ids[1 : 1 + one]
        labels[at : at + one] = goals[1 : 1 + one]
        mtp_labels[at : at + two] = goals[2 : 2 + two]
        doc_start[at:end] = at
        at = end
    positions = np.arange(seq_len) - doc_start
    positions[at:] = 0
    fields = (input_ids, next_ids, labels, mtp_labels, positions, doc_start)
    return PackedBatch(*(torch.from_numpy(field) for field in fields))


def pack(
    token_lists: Iterable[Sequence[int] | np.ndarray],
    seq_len: int,
    loss_masks: Iterable[Sequence[int] | np.ndarray | None] | None = None,
) -> list[PackedBatch]:
    """Packs documents in order into sequences of `seq_len`; the last one is padded, empty documents vanish.

    `loss_masks`: one a document, 1 where the token is a target; None (as a whole or for a document): every token is.
    """
    assert seq_len > 0, seq_len
    documents = [np.asarray(tokens, np.int64) for tokens in token_lists]
    masks = [None] * len(documents) if loss_masks is None else list(loss_masks)
    batches: list[PackedBatch] = []
    pieces: list[Piece] = []
    room = seq_len
    for ids, mask in zip(documents, masks, strict=True):
        targets = None if mask is None else np.asarray(mask, bool)
        assert targets is None or targets.shape == ids.shape, f"mask of {len(mask or ())} for {len(ids)} tokens"
        start = 0
        while start < len(ids):
            end = min(len(ids), start + room)
            pieces.append(Piece.cut(ids, targets, start, end))
            room -= end - start
            start = end
            if room == 0:
                batches.append(assemble(pieces, seq_len))
                pieces, room = [], seq_len
    if pieces:
        batches.append(assemble(pieces, seq_len))
    return batches
