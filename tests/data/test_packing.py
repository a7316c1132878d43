"""Packing against a slow restatement of its contract: every token once and in order, targets right across cuts."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.packing import IGNORE, PackedBatch, Piece, assemble, pack

DOCUMENTS = st.lists(st.lists(st.tuples(st.integers(1, 999), st.booleans()), max_size=30), max_size=8)


def expected_rows(documents: list[list[tuple[int, bool]]], seq_len: int) -> list[dict[str, int]]:
    """One dict a token, in order, straight from the definition."""
    rows: list[dict[str, int]] = []
    for document in documents:
        for place, (token, _) in enumerate(document):
            row = len(rows)
            at = row % seq_len
            after = [document[place + k] if place + k < len(document) else None for k in (1, 2)]
            segment = at if place == 0 or at == 0 else rows[-1]["doc_start"]
            rows.append(
                {
                    "input_ids": token,
                    "next_ids": after[0][0] if after[0] else 0,
                    "labels": after[0][0] if after[0] and after[0][1] else IGNORE,
                    "mtp_labels": after[1][0] if after[1] and after[1][1] else IGNORE,
                    "positions": at - segment,
                    "doc_start": segment,
                }
            )
    return rows


@settings(max_examples=150, deadline=None)
@given(documents=DOCUMENTS, seq_len=st.integers(1, 17))
@example(documents=[[(1, True), (2, True), (3, True), (4, True)]], seq_len=2)
def test_every_row_is_what_the_definition_says(documents: list[list[tuple[int, bool]]], seq_len: int) -> None:
    batches = pack(
        [[token for token, _ in document] for document in documents],
        seq_len,
        [[said for _, said in document] for document in documents],
    )
    rows = expected_rows(documents, seq_len)
    assert len(batches) == -(-len(rows) // seq_len)
    padding = {"input_ids": 0, "next_ids": 0, "labels": IGNORE, "mtp_labels": IGNORE, "positions": 0}
    rows += [padding | {"doc_start": seq_len}] * (len(batches) * seq_len - len(rows))
    for name in PackedBatch.__dataclass_fields__:
        packed = [int(x) for batch in batches for x in batch.tensors()[name]]
        assert packed == [row[name] for row in rows], name


def test_fields_are_int64_vectors_of_seq_len() -> None:
    (batch,) = pack([[1, 2, 3]], 5)
    assert all(tensor.shape == (5,) and tensor.dtype == torch.int64 for tensor in batch.tensors().values())


def test_targets_are_known_across_a_cut_and_stop_at_the_end_of_a_document() -> None:
    first, second = pack([[1, 2, 3, 4, 5], [6]], 3)
    assert first.labels.tolist() == [2, 3, 4] and first.mtp_labels.tolist() == [3, 4, 5]
    assert second.input_ids.tolist() == [4, 5, 6] and second.doc_start.tolist() == [0, 0, 2]
    assert second.labels.tolist() == [5, IGNORE, IGNORE] and second.next_ids.tolist() == [5, 0, 0]


def test_without_a_mask_every_token_is_a_target_also_beside_masked_documents() -> None:
    (batch,) = pack([[1, 2, 3], [4, 5, 6]], 6, [None, [0, 0, 1]])
    assert batch.labels.tolist() == [2, 3, IGNORE, IGNORE, 6, IGNORE]
    assert batch.next_ids.tolist() == [2, 3, 0, 5, 6, 0]


def test_nothing_packs_to_nothing() -> None:
    assert pack([], 4) == [] and pack([[], []], 4) == []


def test_a_piece_may_hold_less_than_it_could_know() -> None:
    batch = assemble([Piece.cut(np.arange(10, 20), None, 3, 5)], 4)
    assert batch.input_ids.tolist() == [13, 14, 0, 0] and batch.labels.tolist() == [14, 15, IGNORE, IGNORE]
    assert batch.mtp_labels.tolist() == [15, 16, IGNORE, IGNORE] and batch.doc_start.tolist() == [0, 0, 4, 4]
