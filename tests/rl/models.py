"""Tiny models in a folder, as a run starts from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from data.tokenizer import load_tokenizer
from model import Transformer, save_pretrained
from tests.train import tiny

Change = Callable[[Transformer, PreTrainedTokenizerFast], None]


def saved(folder: Path, change: Change = lambda net, tokenizer: None, **changes: int) -> str:
    """`folder`/hf with byte tokens; `change`: of its weights, before they are written."""
    tokenizer = load_tokenizer("bytes")
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    net = tiny.build(vocab_size=256, **changes)
    with torch.no_grad():
        change(net, tokenizer)
    save_pretrained(net, folder / "hf", torch.float32, folder / "tokenizer")
    return str(folder / "hf")


def saying(words: Mapping[str, float]) -> Change:
    """Multiplies the head's rows of these tokens: what it says is more extreme in them, likelier or not."""

    def change(net: Transformer, tokenizer: PreTrainedTokenizerFast) -> None:
        for word, factor in words.items():
            net.lm_head.weight[tokenizer.convert_tokens_to_ids(word)] *= factor

    return change
