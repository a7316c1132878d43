"""Tokenizers are slow to make (transformers' import): one of each a session."""

from __future__ import annotations

import pytest

from data.tokenizer import load_tokenizer

WORDS = "return import class lambda yield async await assert finally except continue global nonlocal raise".split()
TEXTS = [
    f"def add_{n}(left, right):\n    return left + {n}\n\n\n# {WORDS[n % 14]} the sum of {WORDS[n % 13]} {n * 7}\n"
    for n in range(300)
]


@pytest.fixture(scope="session")
def byte_tokenizer():
    return load_tokenizer("bytes")


@pytest.fixture(scope="session")
def trained_tokenizer():
    return load_tokenizer("train:320", corpus=TEXTS)
