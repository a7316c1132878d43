"""Decontamination: does a document share a run of words with an evaluation set (GPT-3, arXiv 2005.14165, app. C)?

Text is lower-cased and cut into words; of scripts without spaces every character is one. Every run of 13 words in an
evaluation row is looked for; a row of 8 to 12 words as a whole; shorter ones ("7 + 5 =") are in every other document by
chance and are counted as not looked for. Runs are compared by 64-bit hashes: with 10^10 words of data and 10^6 runs a
wrong hit is a matter of one in 2000.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conf.errors import UserError
from data.files import TEXT_FILES, find_files, suffix
from data.rows import BadRows, read_rows, read_text

RUN, SHORTEST = 13, 8  # words
FIELDS = ("text", "prompt", "question", "problem", "messages")  # of a row: whichever it has
KEY = "data.decontaminate"
MOST_BYTES = 256 << 20  # of an evaluation row or text file
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_NO_SPACES = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_NO_SPACES}]|[^\\W{_NO_SPACES}]+")


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def run_hashes(ids: np.ndarray, length: int) -> np.ndarray:
    """uint64 [max(0, words - length + 1)]: a polynomial in the ids of each run of `length`, modulo 2^64."""
    count = max(0, len(ids) - length + 1)
    found = np.zeros(count, np.uint64)
    for place in range(length):
        found = found * _FACTOR + ids[place : place + count]
    return found


@dataclass
class Runs:
    """What the evaluation sets say, to be looked for. `too_short`: rows that cannot be."""

    vocabulary: dict[str, int] = field(default_factory=dict)  # word -> id from 1
    hashes: dict[int, np.ndarray] = field(default_factory=dict)  # length of a run -> sorted
    num_rows: int = 0
    too_short: int = 0

    def hits(self, text: str) -> bool:
        """Whether the text shares a run with a row."""
        ids = np.array([self.vocabulary.get(word, 0) for word in words(text)], np.uint64)
        for length, known in self.hashes.items():
            found = run_hashes(ids, length)
            places = np.minimum(np.searchsorted(known, found), len(known) - 1)
            if (known[places] == found).any():
                return True
        return False


def make_runs(texts: Iterable[str]) -> Runs:
    runs = Runs()
    found: dict[int, list[np.ndarray]] = {}
    for text in texts:
        row = words(text)
        runs.num_rows += 1
        if len(row) < SHORTEST:
            runs.too_short += 1
            continue
        ids = np.array([runs.vocabulary.setdefault(word, len(runs.vocabulary) + 1) for word in row], np.uint64)
        length = min(RUN, len(row))
        found.setdefault(length, []).append(run_hashes(ids, length))
    runs.hashes = {length: np.unique(np.concatenate(hashes)) for length, hashes in found.items()}
    return runs


def read_runs(paths: Sequence[str], max_bad_rows: int) -> Runs:
    """The runs of words in evaluation files (a file, a glob or a folder each). UserError: no file, a row without any of
    `FIELDS` past the limit, a file of which nothing, or not all, can be looked for."""
    return make_runs(text for path in paths for text in _texts(path, BadRows(max_bad_rows)))


def _texts(path: str, bad: BadRows) -> Iterator[str]:
    for file in find_files(path, KEY):
        if suffix(file) in TEXT_FILES:
            yield from (text for _, text in read_text(file, bad, MOST_BYTES))
            _refuse_skipped(bad)
            continue
        rows = 0
        for origin, row in read_rows(file, FIELDS, bad, max_bytes=MOST_BYTES):
            texts = list(_row_texts(row))
            rows += bool(texts)
            if not texts:
                bad.report(origin, f"none of {', '.join(FIELDS)}")
            yield from texts
        _refuse_skipped(bad)
        if not rows:
            raise UserError(f"{KEY}: {file} has no row with {', '.join(FIELDS)}: give evaluation rows or leave it out")


def _refuse_skipped(bad: BadRows) -> None:
    """What training text may lack without harm, an evaluation set may not: it would count as screened against."""
    for kind in ("too_long", "binary"):
        if kind in bad.skipped:
            raise UserError(f"{KEY}: {bad.skipped[kind][1][0]} is {kind.replace('_', ' ')}: cut it up or leave it out")


def _row_texts(row: Mapping[str, Any]) -> Iterator[str]:
    yield from (row[name] for name in FIELDS[:-1] if isinstance(row.get(name), str))
    messages = row.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, Mapping) and message.get("role") == "user" and isinstance(message.get("content"), str):
            yield message["content"]
