"""A split of a source as one long int32 array, tokenised once and kept on disk for the other ranks and later stages.

Each document ends where the next begins (`offsets`). A token that no loss may ask for (what the user says in a
conversation) is stored as its complement `~id`, so the mask costs nothing. A cache entry is a folder named by a hash of
source, split and tokenizer; written aside and renamed, it is whole or absent, also when several ranks build it at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from conf.errors import UserError
from conf.schema import DataConfig
from data.chat import encode_messages
from data.sources import Document, documents, fingerprint
from data.tokenizer import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 2  # of a cache entry; part of its name
BATCH_CHARS = 1 << 20  # text tokenised at a time


@dataclass(frozen=True)
class Corpus:
    """`tokens` int32 [N] (complement where no target), `offsets` int64 [documents + 1], `digest` of both."""

    tokens: np.ndarray
    offsets: np.ndarray
    digest: str

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1


def encode_document(document: Document, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """One conversation -> int32 ids, complemented where the assistant does not speak."""
    assert document.messages is not None
    ids, mask = encode_messages(document.messages, tokenizer)
    tokens = np.array(ids, np.int32)
    return np.where(np.array(mask, bool), tokens, ~tokens)


def decode_targets(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stored tokens -> (ids int64, targets bool)."""
    targets = tokens >= 0
    return np.where(targets, tokens, ~tokens).astype(np.int64), targets


def _encode_batch(batch: list[Document], tokenizer: PreTrainedTokenizerFast) -> Iterator[np.ndarray]:
    frame_start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    frame_end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = iter(encode_texts(tokenizer, [document.text for document in batch if document.text is not None]))
    for document in batch:
        if document.messages is not None:
            yield encode_document(document, tokenizer)
        else:
            yield np.array([*frame_start, *next(texts), *frame_end], np.int32)


class _Progress:
    """A bar on a terminal, else a line every ten seconds; silent unless `shown`."""

    def __init__(self, title: str, shown: bool) -> None:
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        self.title, self.lines, self.told = title, shown and not terminal, time.monotonic()
        self.bar = tqdm(desc=title, unit=" tokens", unit_scale=True, leave=False, disable=not (shown and terminal))
        self.tokens = 0

    def add(self, tokens: int) -> None:
        self.tokens += tokens
        self.bar.update(tokens)
        if self.lines and time.monotonic() - self.told > 10:
            self.told = time.monotonic()
            print(f"{self.title}: {self.tokens:,} tokens", file=sys.stderr, flush=True)

    def close(self, documents: int) -> None:
        self.bar.close()
        if self.lines or not self.bar.disable:
            print(f"{self.title}: {self.tokens:,} tokens of {documents:,} documents", file=sys.stderr, flush=True)


def _write(
    found: Iterable[Document], tokenizer: PreTrainedTokenizerFast, stream: BinaryIO, progress: _Progress
) -> tuple[np.ndarray, str]:
    """Writes the tokens of all documents; returns offsets and digest."""
    lengths, content = [], hashlib.sha256()

    def flush(batch: list[Document]) -> None:
        for tokens in _encode_batch(batch, tokenizer):
            raw = tokens.tobytes()
            stream.write(raw)
            content.update(raw)
            lengths.append(len(tokens))
            progress.add(len(tokens))

    batch: list[Document] = []
    waiting = 0
    for document in found:
        batch.append(document)
        waiting += len(document.text or "") or 1000
        if waiting > BATCH_CHARS:
            flush(batch)
            batch, waiting = [], 0
    flush(batch)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    content.update(offsets.tobytes())
    progress.close(len(lengths))
    return offsets, content.hexdigest()


def _build(
    folder: Path, cfg: DataConfig, tokenizer: PreTrainedTokenizerFast, split: str, conversations: bool, shown: bool
) -> None:
    found = documents(cfg, split, conversations=conversations)
    with (folder / "tokens.bin").open("wb") as stream:
        offsets, digest = _write(found, tokenizer, stream, _Progress(f"tokenising {cfg.source} ({split})", shown))
    np.save(folder / "offsets.npy", offsets, allow_pickle=False)
    meta = {"format": FORMAT, "source": cfg.source, "path": cfg.path, "split": split, "digest": digest}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _read(folder: Path, mapped: bool) -> Corpus:
    digest = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["digest"]
    offsets = np.load(folder / "offsets.npy", allow_pickle=False)
    path = folder / "tokens.bin"
    tokens = np.memmap(path, np.int32, "r") if mapped else np.fromfile(path, np.int32)
    if len(tokens) != offsets[-1]:
        raise UserError(f"{path} holds {len(tokens)} tokens, not {offsets[-1]}: delete {folder} and start again")
    return Corpus(tokens, offsets, digest)


def _entry_name(cfg: DataConfig, tokenizer: PreTrainedTokenizerFast, split: str, conversations: bool) -> str:
    vocabulary = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    frame = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    parts = [FORMAT, fingerprint(cfg), vocabulary, frame, split, conversations]
    return f"{cfg.source}-{split}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]}"


def open_corpus(
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    split: str,
    *,
    cache_dir: str | Path | None = None,
    conversations: bool = False,
    progress: bool = False,
) -> Corpus:
    """The tokens of a split, from the cache or tokenised now (and cached, where `cache_dir` is given).

    Errors are those of `data.sources.documents`. Several processes may call it at once; the work is saved, not the
    right result, by letting one go first.
    """
    with ExitStack() as stack:
        if cache_dir is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="winnow-")))
            _build(folder, cfg, tokenizer, split, conversations, progress)
            return _read(folder, mapped=False)
        entry = Path(cache_dir) / _entry_name(cfg, tokenizer, split, conversations)
        if not entry.is_dir():
            entry.parent.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=".building-", dir=entry.parent))
            stack.callback(shutil.rmtree, aside, ignore_errors=True)
            _build(aside, cfg, tokenizer, split, conversations, progress)
            try:
                os.rename(aside, entry)
            except OSError:
                if not entry.is_dir():  # else another process was first, with the same content
                    raise
        return _read(entry, mapped=True)
