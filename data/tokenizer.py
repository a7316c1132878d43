"""Text <-> ids: bytes, a byte-level BPE trained on the run's own text, or a folder's; all transformers' fast class.

The special tokens are DeepSeek's, `｜DSML｜` among them, which is in every tag of a tool call. V4's tokenizer has it as
an added token; V3's, with the ids that the example in V3.2's release shows, has not; V3.2's own file was not at hand.
So where a tokenizer has the added token we take it, and else DSML is ordinary text: what the released encoder's text
becomes either way.

The byte tokenizer has exactly 256 ids: thirteen byte values (C0, C1, F5..FF) never occur in UTF-8, and eight of them
carry the special tokens. Text is data, not markup: `encode_texts` never turns a special token's spelling inside a text
into that token.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from conf.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
THINK, END_THINK, USER, ASSISTANT = "<think>", "</think>", "<｜User｜>", "<｜Assistant｜>"
DSML = "｜DSML｜"
SPECIAL_TOKENS = (BOS, EOS, PAD, THINK, END_THINK, USER, ASSISTANT, DSML)
NEVER_IN_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))
SMALLEST = 256 + len(SPECIAL_TOKENS)  # a trained vocabulary holds every byte


class ChatIds(NamedTuple):
    """Ids of the tokens that frame a conversation; None where DSML is no token of its own."""

    bos: int
    eos: int
    think: int
    end_think: int
    user: int
    assistant: int
    dsml: int | None


def byte_letters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table), by byte value."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in plain)
    table = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def _bytes_backend() -> Tokenizer:
    """Id = byte value, except where a byte cannot occur and a special token sits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = byte_letters()
    for byte, token in zip(NEVER_IN_UTF8, SPECIAL_TOKENS, strict=False):
        names[byte] = token
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def _trained_backend(vocab_size: int, corpus: Iterable[str]) -> Tokenizer:
    """Byte-level BPE in which every digit is a token of its own; may end up smaller on a small corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=byte_letters(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return backend


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[THINK, END_THINK, USER, ASSISTANT, DSML],
        clean_up_tokenization_spaces=False,
    )


def _from_folder(folder: Path, key: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not folder.is_dir():
        raise UserError(f"{key}={folder} is no folder: use bytes, train:VOCAB or a folder with tokenizer.json")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} holds no tokenizer.json: give data.tokenizer=FOLDER that does, bytes or train:VOCAB")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the tokenizer in {folder} cannot be read: {reason}; save it anew or use another") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer in {folder} has no fast form: save it with transformers' fast class")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def load_tokenizer(
    spec: str, fallback_folder: str | Path | None = None, corpus: Iterable[str] | None = None
) -> PreTrainedTokenizerFast:
    """`data.tokenizer` -> tokenizer.

    `auto` is the tokenizer of `fallback_folder` (the checkpoint a run starts from), or `bytes` where there is no
    checkpoint; `train:VOCAB` learns from `corpus` (`data.sources.tokenizer_corpus`). UserError on anything else.
    """
    if spec == "auto" and fallback_folder is not None:
        return _from_folder(Path(fallback_folder), "init_from")
    if spec in ("auto", "bytes"):
        return _wrap(_bytes_backend())
    if not spec.startswith("train:"):
        return _from_folder(Path(spec), "data.tokenizer")
    size = spec.removeprefix("train:")
    if not size.isdecimal() or int(size) < SMALLEST:
        raise UserError(f"data.tokenizer={spec} has no usable size: give train:VOCAB with VOCAB of {SMALLEST} or more")
    assert corpus is not None, "train:VOCAB needs a corpus"
    return _wrap(_trained_backend(int(size), corpus))


@lru_cache(maxsize=8)
def chat_ids(tokenizer: PreTrainedTokenizerFast) -> ChatIds:
    """Ids of DeepSeek's chat tokens. UserError where the tokenizer lacks one (other than DSML)."""
    vocab = tokenizer.backend_tokenizer.token_to_id
    found = {name: vocab(name) for name in (THINK, END_THINK, USER, ASSISTANT)}
    found |= {BOS: tokenizer.bos_token_id, EOS: tokenizer.eos_token_id}
    ids = {name: token for name, token in found.items() if token is not None}
    if len(ids) < len(found):
        missing = " ".join(name for name in found if name not in ids)
        raise UserError(f"the tokenizer has no {missing}, which conversations need: add it, or use another")
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    dsml = vocab(DSML) if DSML in added else None
    return ChatIds(ids[BOS], ids[EOS], ids[THINK], ids[END_THINK], ids[USER], ids[ASSISTANT], dsml)


@lru_cache(maxsize=8)
def spells_dsml(tokenizer: PreTrainedTokenizerFast) -> None:
    """UserError where the tokenizer cannot write DSML as text."""
    (ids,) = encode_texts(tokenizer, [DSML])
    if tokenizer.decode(ids) != DSML:
        raise UserError(f"the tokenizer cannot spell {DSML}, which tool calls need: add it as a token, or use another")


@lru_cache(maxsize=8)
def _markup(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Finds the spelling of any special token (`<think>` is an ordinary added token in some vocabularies)."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = {name for name in special | set(SPECIAL_TOKENS) if len(name) > 1}
    return re.compile("|".join(map(re.escape, sorted(names))))


def _defused(text: str, markup: re.Pattern[str], marks: Container[int]) -> list[str]:
    """The text in parts that hold no special token's spelling, but for those at `marks`: each one found is cut after
    its first character."""
    parts, start = [], 0
    match = markup.search(text)
    while match:
        cut = match.start() + 1
        if match.start() not in marks:
            parts.append(text[start:cut])
            start = cut
        match = markup.search(text, cut)
    return [*parts, text[start:]]


def encode_texts(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], marks: Sequence[Container[int]] | None = None
) -> list[list[int]]:
    """Ids of plain texts, without bos or eos; decodes to the text again, but never holds a special token.

    `marks`: for each text where DSML stands on purpose, for a tokenizer that has no token for it."""
    markup = _markup(tokenizer)
    parts = [_defused(text, markup, marked) for text, marked in zip(texts, marks or [()] * len(texts), strict=True)]
    flat = [part for text_parts in parts for part in text_parts]
    encoded = iter(tokenizer.backend_tokenizer.encode_batch_fast(flat, add_special_tokens=False))
    return [[i for _ in text_parts for i in next(encoded).ids] for text_parts in parts]
