"""Samples -> packed training rows: tensors for the model's forward, and beside each label what the loss wants to know
of it.

Row t of the model predicts token t+1, so a sampled token's behaviour log-prob, advantage and sequence number sit one
place before the token itself, where its label is. Prompts, tool results and padding have label -100 and sequence -1.
A sample of several rows (`Sample.earlier`) is as many sequences, with the advantage that it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.ops.vocab_loss import KeptSets
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
    behaviour: Tensor  # fp32 log-prob of the label when it was sampled; NaN where the sampler gave none
    advantages: Tensor  # fp32
    sequence: Tensor  # int64 number of the sequence inside this row, -1 where nothing was sampled
    num_sequences: int
    domains: tuple[str, ...] = ()  # of each sequence
    packed: tuple[tuple[int, int], ...] = ()  # of each: its sample's place among those packed, its row of the sample
    lengths: tuple[int, ...] = ()  # of each: tokens that were drawn of its sample, in all rows: |o_i|
    kept: KeptSets | None = None  # words that were in the running for the label
    experts: Tensor | None = None  # [M, T, K]
    selected: Tensor | None = None  # [L, T, k] positions in this row

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
    """Packs whole sequences into rows of `length` tokens, in order (first row with room).

    Raises ValueError for one that is longer than a row.
    """
    assert len(samples) == len(advantages)
    members: list[list[tuple[int, int]]] = []
    room: list[int] = []
    for place in ((i, number) for i, sample in enumerate(samples) for number in range(len(sample.rows))):
        size = len(samples[place[0]].rows[place[1]])
        if size > length:
            raise ValueError(
                f"a sample of {size} tokens does not fit rl.pack_len={length}: give rl.pack_len={size} or more"
            )
        row = next((r for r, left in enumerate(room) if left >= size), len(room))
        if row == len(room):
            members.append([])
            room.append(length)
        members[row].append(place)
        room[row] -= size
    return [_fill(samples, advantages, inside, length) for inside in members]


def _fill(
    samples: Sequence[Sample], advantages: Sequence[float], inside: Sequence[tuple[int, int]], length: int
) -> TrainingRow:
    row = empty_row(length)
    kept: list[list[int]] = [[] for _ in range(length)]
    sequences = [(samples[i].rows[number], advantages[i]) for i, number in inside]
    experts = _blank([tokens.routed_experts for tokens, _ in sequences], length)
    selected = _blank([tokens.selected for tokens, _ in sequences], length)
    start = 0
    for number, (tokens, advantage) in enumerate(sequences):
        stop = start + len(tokens)
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
        if tokens.kept_sets is not None:
            kept[start : stop - 1] = tokens.kept_sets[1:]
        if experts is not None and tokens.routed_experts is not None:
            experts[start:stop] = tokens.routed_experts
        if selected is not None and tokens.selected is not None:
            selected[start:stop] = torch.where(tokens.selected >= 0, tokens.selected + start, -1)
        start = stop
    recorded = {
        "kept": KeptSets.of(kept) if any(kept) else None,
        "experts": None if experts is None else experts.transpose(0, 1),
        "selected": None if selected is None else selected.transpose(0, 1),
    }
    return replace(
        row,
        num_sequences=len(inside),
        domains=tuple(samples[i].request.domain for i, _ in inside),
        packed=tuple(inside),
        lengths=tuple(samples[i].num_sampled for i, _ in inside),
        **recorded,  # type: ignore[arg-type]
    )


def _blank(records: list[Tensor | None], length: int) -> Tensor | None:
    """A record [length, ...] of rows that did not run, in the form of those that samples bring; None if none does."""
    like = next((record for record in records if record is not None), None)
    return None if like is None else torch.full((length, *like.shape[1:]), -1, dtype=like.dtype)
