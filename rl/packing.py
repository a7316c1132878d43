"""Samples -> packed training rows: tensors for the model's forward, and beside each label what the loss wants to know
of it.

Row t of the model predicts token t+1, so a sampled token's behaviour log-prob, advantage and sequence number sit one
place before the token itself, where its label is. Prompts and padding have label -100 and sequence -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rl.messages import Sample

IGNORE = -100


@dataclass(frozen=True)
class TrainingRow:
    """One packed row of T tokens; all tensors [T]."""

    input_ids: Tensor
    next_ids: Tensor
    labels: Tensor
    positions: Tensor
    doc_start: Tensor
    behaviour: Tensor  # fp32 log-prob of the label when it was sampled
    advantages: Tensor  # fp32
    sequence: Tensor  # int64 number of the sample inside this row, -1 where nothing was sampled
    num_sequences: int

    def inputs(self) -> dict[str, Tensor]:
        """The positional arguments of `Transformer.forward` by name; multi-token prediction does not learn in RL."""
        return {
            "input_ids": self.input_ids,
            "next_ids": self.next_ids,
            "labels": self.labels,
            "mtp_labels": torch.full_like(self.labels, IGNORE),
            "positions": self.positions,
            "doc_start": self.doc_start,
        }


def empty_row(length: int) -> TrainingRow:
    """A row of padding: keeps a rank in step with others that have more rows, at zero weight."""
    zeros = torch.zeros(length, dtype=torch.int64)
    return TrainingRow(
        input_ids=zeros.clone(),
        next_ids=zeros.clone(),
        labels=torch.full_like(zeros, IGNORE),
        positions=zeros.clone(),
        doc_start=torch.full_like(zeros, length),
        behaviour=torch.zeros(length),
        advantages=torch.zeros(length),
        sequence=torch.full_like(zeros, -1),
        num_sequences=0,
    )


def pack_samples(samples: Sequence[Sample], advantages: Sequence[float], length: int) -> list[TrainingRow]:
    """Packs whole samples into rows of `length` tokens, in order (first row with room).

    Raises ValueError for a sample that is longer than a row.
    """
    assert len(samples) == len(advantages)
    members: list[list[int]] = []
    room: list[int] = []
    for i, sample in enumerate(samples):
        size = len(sample.tokens)
        if size > length:
            raise ValueError(
                f"a sample of {size} tokens does not fit rl.pack_len={length}: give rl.pack_len={size} or more"
            )
        row = next((r for r, left in enumerate(room) if left >= size), len(room))
        if row == len(room):
            members.append([])
            room.append(length)
        members[row].append(i)
        room[row] -= size
    return [_fill([samples[i] for i in row], [advantages[i] for i in row], length) for row in members]


def _fill(samples: list[Sample], advantages: list[float], length: int) -> TrainingRow:
    row = empty_row(length)
    start = 0
    for number, (sample, advantage) in enumerate(zip(samples, advantages, strict=True)):
        tokens, stop = sample.tokens, start + len(sample.tokens)
        ids = torch.tensor(tokens.ids)
        row.input_ids[start:stop] = ids
        row.next_ids[start : stop - 1] = ids[1:]
        row.positions[start:stop] = torch.arange(stop - start)
        row.doc_start[start:stop] = start
        sampled = torch.tensor(tokens.loss_mask)[1:]
        predicting = torch.arange(start, stop - 1)[sampled]
        row.labels[predicting] = ids[1:][sampled]
        row.behaviour[predicting] = torch.tensor(tokens.behaviour_logprobs)[1:][sampled]
        row.advantages[predicting] = advantage
        row.sequence[predicting] = number
        start = stop
    return TrainingRow(**{**vars(row), "num_sequences": len(samples)})
