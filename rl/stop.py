"""Stop strings (`rl.stop`): a sample ends where its text first holds one of them, as in vLLM.

The tokens stay as they were drawn, the text is cut before the string. A token's text depends on its neighbours (a
character of several bytes may lie in several tokens), so the ids are decoded, but after each token only as many of the
last ones as a string could lie in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

MARGIN = 4  # characters that a cut through the ids may spoil: one of up to 4 bytes, or a leading space


class StopStrings:
    """`strings`: none of them empty. decode: ids -> text, special tokens included."""

    def __init__(self, strings: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        self.strings, self.decode = tuple(strings), decode
        self.longest = max(map(len, self.strings), default=0)

    def cut(self, text: str) -> str:
        """The text before the first stop string; all of it where there is none."""
        starts = [at for string in self.strings if (at := text.find(string)) >= 0]
        return text[: min(starts)] if starts else text

    def ended_by_last(self, ids: list[int]) -> bool:
        """Whether the text of `ids`, which held no stop string before the last of them, holds one now."""
        tail = self._tail(ids)
        if not any(string in tail for string in self.strings):
            return False
        whole = self.decode(ids)  # a tail alone can read otherwise than as a part of it
        return any(string in whole for string in self.strings)

    def _tail(self, ids: list[int]) -> str:
        """The end of the text: a string that ends inside the last token, and MARGIN characters more."""
        room = self.longest + len(self.decode(ids[-1:])) + MARGIN
        size = room
        while size < len(ids):
            text = self.decode(ids[-size:])
            if len(text) >= room:
                return text
            size *= 2  # ids without text of their own: bytes inside a character, or past the tokenizer's last
        return self.decode(ids)
