"""Tokenizers are slow to make (transformers' import): one of each a session."""

from __future__ import annotations

import pytest

from data.tokenizer import BOS, DSML, EOS, PAD, SPECIAL_TOKENS, byte_letters, load_tokenizer

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
    """A tokenizer to which DSML is ordinary text, and parts of it and its neighbours one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=list(SPECIAL_TOKENS[:-1]), initial_alphabet=byte_letters(), show_progress=False
    )
    backend.train_from_iterator([f"x<{DSML}a>y</{DSML}a>"] * 50, trainer)
    assert backend.encode(f"<{DSML}").tokens != backend.encode("<｜").tokens + backend.encode(DSML[1:]).tokens
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD)
