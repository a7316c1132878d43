"""Near-duplicates by MinHash (Broder 1997) and banded lookup, by `datasketch`: of similar documents the first stays.

Similarity is Jaccard's of the sets of runs of five words; 128 hashes estimate it within 0.04 (one standard deviation).
A signature is a pure function of the text, so workers make them; the lookup goes document by document in the source's
order, over both splits, so that what is held out has no near-copy in training. It takes some KB of memory a document.
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import Any

import numpy as np

from conf.errors import UserError
from data.overlap import run_hashes, words

NUM_HASHES, SHINGLE = 128, 5
WEIGHTS = (0.1, 0.9)  # of false and of missed candidates: a false one is compared and let go
SCHEME, SEED = "affine32", 1


@lru_cache(maxsize=1)
def _empty() -> Any:
    from datasketch import MinHash

    return MinHash(NUM_HASHES, seed=SEED, hashfunc=int, scheme=SCHEME)


def require() -> None:
    """UserError where the library is missing."""
    try:
        import datasketch  # noqa: F401
    except ImportError as error:
        raise UserError("data.dedup needs datasketch: pip install 'winnow[dedup]', or leave it out") from error


def signature(text: str) -> np.ndarray:
    """uint32 [NUM_HASHES]. Texts shorter than a run count as one run."""
    found = words(text) or [text]
    ids = np.array([zlib.crc32(word.encode("utf-8")) for word in found], np.uint64)
    hashes = run_hashes(ids, min(SHINGLE, len(ids)))
    hashes ^= hashes >> np.uint64(32)
    sketch = _empty().copy()
    sketch.update_batch(np.unique(hashes & np.uint64(0xFFFFFFFF)).tolist())
    return sketch.hashvalues


class Seen:
    """The documents kept so far."""

    def __init__(self, threshold: float) -> None:
        require()
        from datasketch import MinHashLSH

        self.threshold = threshold
        self.index = MinHashLSH(threshold=threshold, num_perm=NUM_HASHES, weights=WEIGHTS)
        self.signatures: list[np.ndarray] = []

    def is_duplicate(self, found: np.ndarray) -> bool:
        """Whether a kept document is at least as similar as the threshold; else this one is kept."""
        from datasketch import LeanMinHash

        sketch = LeanMinHash(seed=SEED, hashvalues=found, scheme=SCHEME)
        similar = (self.signatures[number] for number in self.index.query(sketch))
        if any(np.mean(other == found) >= self.threshold for other in similar):
            return True
        self.index.insert(len(self.signatures), sketch)
        self.signatures.append(found)
        return False
