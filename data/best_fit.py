"""Which documents share a sequence: best-fit decreasing (Ding et al. 2024, arXiv 2404.10830), by counts of lengths.

A document longer than a sequence is cut every `seq_len` tokens; the pieces and all shorter documents go, the longest
first, each into the sequence with the least room that still holds it. Documents of one length are placed together, as
many to a sequence as fit, so a million documents take a second or two. Where the lengths are such that this leaves more
than `MAX_PADDING` (few short documents to fill gaps with), the emptiest sequences are dissolved and their documents cut
to fill the gaps of others, up to a given share of documents.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

MAX_PADDING = 0.02  # of all positions
SMALLEST = 256  # no gap below seq_len / SMALLEST is filled with part of a document


@dataclass(frozen=True)
class Plan:
    """Pieces in the order of their sequences. An item is known by its rank in the order of falling length, so a plan
    holds for every assignment of documents of equal length to it."""

    rank: np.ndarray  # int64 [pieces]
    start: np.ndarray  # int64 [pieces]: inside the item, above 0 only where one was cut to fill gaps
    length: np.ndarray  # int64 [pieces]
    first: np.ndarray  # int64 [sequences + 1]: where a sequence's pieces begin
    num_cut: int  # items cut to fill gaps

    @property
    def num_sequences(self) -> int:
        return len(self.first) - 1


def make_plan(lengths: np.ndarray, seq_len: int, max_cut: int = 0) -> Plan:
    """`lengths`: int64 [items], falling, each in 1 .. seq_len. At most `max_cut` of them are cut to fill gaps."""
    assert len(lengths) and lengths[-1] > 0 and lengths[0] <= seq_len, "items in 1 .. seq_len"
    assert (np.diff(lengths) <= 0).all(), "lengths fall"
    home = _place(lengths, seq_len)
    rank, start, length = np.arange(len(lengths)), np.zeros(len(lengths), np.int64), lengths.astype(np.int64)
    home, cuts, num_cut = _fill(home, lengths, seq_len, max_cut)
    if len(cuts):
        stays = home >= 0
        rank = np.concatenate([rank[stays], cuts[:, 0]])
        start = np.concatenate([start[stays], cuts[:, 1]])
        length = np.concatenate([length[stays], cuts[:, 2]])
        home = np.concatenate([home[stays], cuts[:, 3]])
    order = np.argsort(home, kind="stable")
    _, counts = np.unique(home, return_counts=True)
    first = np.concatenate([[0], np.cumsum(counts)])
    return Plan(rank[order], start[order], length[order], first, num_cut)


def _place(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """The sequence of each item, best fit."""
    home = np.empty(len(lengths), np.int64)
    with_room: dict[int, list[np.ndarray]] = {}  # room left -> the sequences that have it, in lots
    rooms: list[int] = []  # the keys, rising
    opened = 0

    def put(sequences: np.ndarray, each: int, size: int, room: int, at: int) -> None:
        home[at : at + each * len(sequences)] = np.repeat(sequences, each)
        if left := room - each * size:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(sequences)

    def take(room: int, most: int) -> np.ndarray:
        lots = with_room[room]
        lot = lots.pop()
        if len(lot) > most:
            lots.append(lot[most:])
            lot = lot[:most]
        if not lots:
            del with_room[room], rooms[bisect_left(rooms, room)]
        return lot

    sizes, counts = np.unique(lengths, return_counts=True)
    at = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            where = bisect_left(rooms, size)
            room = rooms[where] if where < len(rooms) else seq_len
            each = min(room // size, count)
            most = count // each
            if where < len(rooms):
                sequences = take(room, most)
            else:
                sequences, opened = np.arange(opened, opened + most), opened + most
            put(sequences, each, size, room, at)
            at += each * len(sequences)
            count -= each * len(sequences)
    return home


def _fill(home: np.ndarray, lengths: np.ndarray, seq_len: int, max_cut: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Dissolves the emptiest sequences into the gaps of the others.

    Returns (home, -1 where an item was moved; the moved pieces' [rank, start, length, home]; how many items were cut).
    """
    total, opened = int(lengths.sum()), int(home.max()) + 1
    enough = max(-(-total // seq_len), int(total / (seq_len * (1 - MAX_PADDING))))
    none = np.empty((0, 4), np.int64)
    if opened <= enough or max_cut == 0:
        return home, none, 0
    used = np.bincount(home, lengths, opened).astype(np.int64)
    emptiest = np.argsort(used, kind="stable")
    donors, others = emptiest[: opened - enough], emptiest[opened - enough :]
    gaps = [(int(used[one]) - seq_len, int(one)) for one in others if used[one] < seq_len]
    heapq.heapify(gaps)  # the largest first
    by_home = np.argsort(home, kind="stable")
    edges = np.concatenate([[0], np.cumsum(np.bincount(home, minlength=opened))])
    home = home.copy()
    pieces: list[tuple[int, int, int, int]] = []
    num_cut, smallest, room = 0, max(1, seq_len // SMALLEST), int((seq_len - used[others]).sum())
    for donor in donors:
        items = by_home[edges[donor] : edges[donor + 1]]
        if num_cut + len(items) > max_cut or used[donor] > room:
            break
        moved = _cut_into(gaps, [(int(item), int(lengths[item])) for item in items], smallest)
        if moved is None:
            break
        home[items] = -1
        pieces += moved
        num_cut += sum(start == 0 and length < int(lengths[rank]) for rank, start, length, _ in moved)
        room -= int(used[donor])
    return home, np.array(pieces, np.int64).reshape(-1, 4), num_cut


def _cut_into(
    gaps: list[tuple[int, int]], items: list[tuple[int, int]], smallest: int
) -> list[tuple[int, int, int, int]] | None:
    """Pieces of (rank, length) items laid into the largest gaps, which shrink; None, and nothing changed, where the
    gaps are too small."""
    before, pieces = list(gaps), []
    for rank, length in items:
        start = 0
        while start < length:
            gap = -gaps[0][0] if gaps else 0
            if gap < smallest:
                gaps[:] = before
                return None
            here = min(gap, length - start)
            pieces.append((rank, start, here, gaps[0][1]))
            if here == gap:
                heapq.heappop(gaps)
            else:
                heapq.heapreplace(gaps, (here - gap, gaps[0][1]))
            start += here
    return pieces
