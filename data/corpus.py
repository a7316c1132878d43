"""A split of a source as one long int32 array, tokenised once and kept on disk for the other ranks and later stages.

Each document ends where the next begins (`offsets`). A token that no loss may ask for (what the user says in a
conversation) is stored as its complement `~id`, so the mask costs nothing. A cache entry is a folder named by a hash of
all that decides its content (files and their times, split, tokenizer, screening, versions); written aside and renamed,
it is whole or absent, also when several ranks build it at once. Its `meta.json` says what was left out, and why.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from conf.errors import UserError
from conf.schema import DataConfig
from data.duplicates import Seen
from data.files import find_files
from data.overlap import KEY, Runs, read_runs
from data.rows import BadRows
from data.sources import Document, documents, file_state, fingerprint
from data.split import in_split
from data.worker import Recipe, make_all, num_workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 3  # of a cache entry; part of its name
BATCH_CHARS = 1 << 19  # text tokenised at a time
SCREENED = ("contaminated", "duplicate")


@dataclass(frozen=True)
class Corpus:
    """`tokens` int32 [N] (complement where no target), `offsets` int64 [documents + 1], `digest` of both; `meta`: what
    was left out of it, and how long it took."""

    tokens: np.ndarray
    offsets: np.ndarray
    digest: str
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1


def decode_targets(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stored tokens -> (ids int64, targets bool)."""
    targets = tokens >= 0
    return np.where(targets, tokens, ~tokens).astype(np.int64), targets


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


def _batches(found: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    waiting = 0
    for document in found:
        batch.append(document)
        waiting += len(document.text or "") or 1000
        if waiting > BATCH_CHARS:
            yield batch
            batch, waiting = [], 0
    if batch:
        yield batch


def _kept(
    cfg: DataConfig, recipe: Recipe, found: Iterable[Document], bad: BadRows, workers: int
) -> Generator[np.ndarray]:
    """The tokens of each document that stays, in order."""
    seen = Seen(cfg.dedup) if cfg.dedup is not None else None
    with closing(make_all(_batches(found), recipe, workers)) as results:
        for document, one in (pair for batch, made in results for pair in zip(batch, made, strict=True)):
            duplicate = seen is not None and one.signature is not None and seen.is_duplicate(one.signature)
            if not (one.contaminated or duplicate):
                if one.tokens is not None:
                    yield one.tokens
            elif in_split(document.key, recipe.split, recipe.heldout):
                bad.skip("contaminated" if one.contaminated else "duplicate", document.origin)


def _write(
    kept: Iterable[np.ndarray], max_tokens: int | None, stream: BinaryIO, progress: _Progress
) -> tuple[np.ndarray, str]:
    """Writes the tokens of all documents; returns offsets and digest."""
    lengths, content = [], hashlib.sha256()
    for tokens in kept:
        raw = tokens.tobytes()
        stream.write(raw)
        content.update(raw)
        lengths.append(len(tokens))
        progress.add(len(tokens))
        if max_tokens is not None and progress.tokens >= max_tokens:
            break
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    content.update(offsets.tobytes())
    progress.close(len(lengths))
    return offsets, content.hexdigest()


def _build(
    folder: Path, cfg: DataConfig, tokenizer: PreTrainedTokenizerFast, split: str, conversations: bool, shown: bool
) -> None:
    bad, start = BadRows(cfg.max_bad_rows), time.monotonic()
    runs = read_runs(cfg.decontaminate, cfg.max_bad_rows) if cfg.decontaminate else None
    recipe = Recipe(tokenizer, split, cfg.heldout, cfg.dedup is not None, runs)
    found = documents(cfg, split, conversations=conversations, bad=bad, both=cfg.dedup is not None)
    kept = _kept(cfg, recipe, found, bad, num_workers(cfg.workers))
    progress = _Progress(f"tokenising {cfg.source} ({split})", shown)
    with (folder / "tokens.bin").open("wb") as stream, closing(kept):
        offsets, digest = _write(kept, cfg.max_tokens, stream, progress)
    if len(offsets) == 1:
        raise UserError(f"{_dropped(bad)} leave nothing of {cfg.path or cfg.source}: check the evaluation sets given")
    np.save(folder / "offsets.npy", offsets, allow_pickle=False)
    meta = {
        "format": FORMAT,
        "source": cfg.source,
        "path": cfg.path,
        "split": split,
        "digest": digest,
        "documents": len(offsets) - 1,
        "tokens": int(offsets[-1]),
        "seconds": round(time.monotonic() - start, 2),
        "left_out": {kind: {"count": count, "first": named} for kind, (count, named) in sorted(bad.skipped.items())},
        "evaluation_rows": _rows_of(runs),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _dropped(bad: BadRows) -> str:
    counts = [f"{bad.skipped[kind][0]} {kind} documents" for kind in SCREENED if kind in bad.skipped]
    return " and ".join(counts)


def _rows_of(runs: Runs | None) -> dict[str, int]:
    return {} if runs is None else {"looked_for": runs.num_rows - runs.too_short, "too_short": runs.too_short}


def _read(folder: Path, mapped: bool) -> Corpus:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    offsets = np.load(folder / "offsets.npy", allow_pickle=False)
    path = folder / "tokens.bin"
    tokens = np.memmap(path, np.int32, "r") if mapped else np.fromfile(path, np.int32)
    if len(tokens) != offsets[-1]:
        raise UserError(f"{path} holds {len(tokens)} tokens, not {offsets[-1]}: delete {folder} and start again")
    return Corpus(tokens, offsets, meta["digest"], meta)


def _entry_name(cfg: DataConfig, tokenizer: PreTrainedTokenizerFast, split: str, conversations: bool) -> str:
    import tokenizers

    vocabulary = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    frame = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    against = [file_state(file) for path in cfg.decontaminate for file in find_files(path, KEY)]
    screening = [cfg.dedup, against, cfg.max_tokens]
    parts = [FORMAT, tokenizers.__version__, fingerprint(cfg), vocabulary, frame, split, conversations, screening]
    return f"{cfg.source}-{split}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]}"


def _made_aside(cache: Path) -> Path:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".building-", dir=cache))
    except OSError as error:
        raise UserError(
            f"{cache}, where tokens are kept beside output_dir, cannot be written ({error.strerror}): give another one"
        ) from error


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
            aside = _made_aside(entry.parent)
            stack.callback(shutil.rmtree, aside, ignore_errors=True)
            _build(aside, cfg, tokenizer, split, conversations, progress)
            try:
                os.rename(aside, entry)
            except OSError:
                if not entry.is_dir():  # else another process was first, with the same content
                    raise
        return _read(entry, mapped=True)
