"""Tokenizers are slow to make (transformers' import): one of each a session."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

from data.tokenizer import BOS, DSML, EOS, PAD, load_tokenizer

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


@pytest.fixture(scope="session")
def without_dsml():
    """A tokenizer of an earlier run, to which DSML is ordinary text."""
    from transformers import PreTrainedTokenizerFast

    made = load_tokenizer("bytes").backend_tokenizer.to_str()
    assert json.loads(made)["added_tokens"][-1]["content"] == DSML
    old = json.loads(made)
    dsml = old["added_tokens"].pop()
    old["model"]["vocab"] = {name: token for name, token in old["model"]["vocab"].items() if token != dsml["id"]}
    old["model"]["vocab"]["unused"] = dsml["id"]
    backend = Tokenizer.from_str(json.dumps(old))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD)
