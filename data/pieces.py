"""A conversation as text in pieces, markup and data, and from there its ids.

The spelling of a special token is that token in markup alone; in data (what users, tools and the assistant write) it
stays text. Between two special tokens everything is tokenised in one go, as where a whole prompt is tokenised at once.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from data.tokenizer import ASSISTANT, BOS, DSML, END_THINK, EOS, THINK, USER, chat_ids, encode_texts, spells_dsml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FRAME = (BOS, EOS, THINK, END_THINK, USER, ASSISTANT, DSML)  # what markup may hold
_FRAME = re.compile("(" + "|".join(map(re.escape, FRAME)) + ")")


class Piece(NamedTuple):
    """`said`: the assistant says it, so it is trained on."""

    text: str
    markup: bool = False
    said: bool = False


class Run(NamedTuple):
    """Text between two special tokens, or (`special`) one of them. `marks`: where in it DSML stands as markup, for a
    tokenizer that has no token for it."""

    text: str
    said: bool
    special: bool = False
    marks: frozenset[int] = frozenset()


def text_of(pieces: Iterable[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def runs(pieces: Iterable[Piece], special: Container[str] = FRAME) -> Iterator[Run]:
    """What is tokenised at a time, in order; none is empty."""
    text, said = "", False
    marks: set[int] = set()
    for piece in pieces:
        for number, part in enumerate(_FRAME.split(piece.text) if piece.markup else [piece.text]):
            is_token = number % 2 == 1 and part in special  # split() puts what the pattern found at odd places
            if text and (is_token or piece.said != said):
                yield Run(text, said, marks=frozenset(marks))
                text, marks = "", set()
            said = piece.said
            if is_token:
                yield Run(part, said, special=True)
            else:
                marks |= {len(text)} if number % 2 == 1 else set()
                text += part
    if text:
        yield Run(text, said, marks=frozenset(marks))


def plain_texts(pieces: Iterable[Piece]) -> list[str]:
    """What a tokenizer is to learn words from: the text between special tokens."""
    return [run.text for run in runs(pieces) if not run.special]


def ids_of(pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Ids, and a mask of the same length, 1 on what the assistant says.

    DSML is the tokenizer's own added token; where it has none, ordinary text. UserError: it lacks a chat token, or
    cannot even spell DSML where that is needed.
    """
    frame = chat_ids(tokenizer)
    table = dict(zip(FRAME, frame, strict=True))
    special = {name: token for name, token in table.items() if token is not None}
    if DSML not in special and any(piece.markup and DSML in piece.text for piece in pieces):
        spells_dsml(tokenizer)
    found = list(runs(pieces, special))
    texts = [run for run in found if not run.special]
    encoded = iter(encode_texts(tokenizer, [run.text for run in texts], [run.marks for run in texts]))
    ids: list[int] = []
    mask: list[int] = []
    for run in found:
        tokens = [special[run.text]] if run.special else next(encoded)
        ids += tokens
        mask += [int(run.said)] * len(tokens)
    return ids, mask
