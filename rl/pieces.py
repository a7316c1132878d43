"""The text of each token, so that the pieces of a sample put together are its text.

A token may end inside a character (byte-level vocabularies split UTF-8): such a character belongs to the token that
completes it, and the tokens before it have less text or none. Decoders answer an unfinished tail with one U+FFFD, so
all text but that is settled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
LONGEST_WAIT = 64  # tokens without a clean end, after which it is broken UTF-8 that nothing will complete


def text_pieces(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """One string a token. Decodes every stretch between clean ends anew with each token, never the whole."""
    pieces: list[str] = []
    start, given = 0, 0  # first token of the stretch, characters of it that are given away
    for stop in range(1, len(ids) + 1):
        text = decode(list(ids[start:stop]))
        clean = not text.endswith(UNFINISHED)
        settled = text if clean or stop == len(ids) or stop - start >= LONGEST_WAIT else text[: -len(UNFINISHED)]
        pieces.append(settled[given:])
        start, given = (stop, 0) if len(settled) == len(text) else (start, len(settled))
    return pieces
