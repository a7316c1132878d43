"""Which side of the split a key lies on: the one rule that training text, conversations and RL prompts all ask.

A key names what must not be seen twice: the digest of a text, the question of a conversation, the unordered operands
of an addition. Its hash decides, so the answer depends on nothing but the key and the share: not on order, seed, file
or stage; and what is held out at one share stays held out at every larger one.
"""

from __future__ import annotations

import hashlib
import re

SPLITS = ("train", "heldout")
SMALL_SHARE = 0.1  # of the 5,050 additions below 100: leaves over 256 to measure on
_SMALL_ADDITION = re.compile(r"\d{1,2}\+\d{1,2}")


def digest(text: str) -> str:
    """Hex sha256 of a text: the key of a document. UnicodeEncodeError (a ValueError) on a lone surrogate."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def is_heldout(key: str, share: float) -> bool:
    """Whether `key` is among the held-out `share` of all keys. Of additions below 100 at least a tenth is."""
    if _SMALL_ADDITION.fullmatch(key):
        share = max(share, SMALL_SHARE)
    return int(digest(key)[:16], 16) < share * 2**64


def in_split(key: str, split: str, share: float) -> bool:
    """Whether `key` belongs to `split`, train or heldout."""
    assert split in SPLITS, split
    return is_heldout(key, share) == (split == "heldout")
