"""Documents -> tokens, signatures and overlap, in this process or in several: the same results in the same order.

Workers are fresh interpreters (`python -m data.worker`: no fork beside threads, no import of the caller's main module)
that get a pickled recipe and then batches on stdin. Processes and not the tokenizers library's own threads: those share
an allocator and a cache, and two of them were slower than one (docs/data.md).
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from queue import SimpleQueue
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from conf.errors import UserError
from data.chat import encode_messages
from data.duplicates import signature
from data.overlap import Runs
from data.sources import Document
from data.split import in_split
from data.tokenizer import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
MOST = 16  # workers that data.workers=0 starts; past that the reader cannot keep up
FEW = 4  # batches that are done before any process is started
QUIET = {"TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Recipe:
    """What is made of a document of `split`; of the other split's no tokens."""

    tokenizer: PreTrainedTokenizerFast
    split: str
    heldout: float
    signatures: bool = False
    runs: Runs | None = None


class Made(NamedTuple):
    """`tokens` int32, complemented where no loss may ask for them; None: of the other split, or contaminated."""

    tokens: np.ndarray | None
    signature: np.ndarray | None = None
    contaminated: bool = False


def encode_document(document: Document, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """One conversation -> int32 ids, complemented where the assistant does not speak."""
    assert document.messages is not None
    ids, mask = encode_messages(document.messages, tokenizer)
    tokens = np.array(ids, np.int32)
    return np.where(np.array(mask, bool), tokens, ~tokens)


def make(batch: Sequence[Document], recipe: Recipe) -> list[Made]:
    """One result a document."""
    tokenizer = recipe.tokenizer
    frame_start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    frame_end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    screened = recipe.signatures or recipe.runs is not None
    plain = [document.plain() if screened else "" for document in batch]
    hits = [recipe.runs is not None and recipe.runs.hits(text) for text in plain]
    wanted = [
        not hit and in_split(document.key, recipe.split, recipe.heldout)
        for document, hit in zip(batch, hits, strict=True)
    ]
    texts = [one.text for one, want in zip(batch, wanted, strict=True) if want and one.text is not None]
    encoded = iter(encode_texts(tokenizer, texts))
    made = []
    for document, text, hit, want in zip(batch, plain, hits, wanted, strict=True):
        tokens = None
        if want and document.messages is not None:
            tokens = encode_document(document, tokenizer)
        elif want:
            tokens = np.array([*frame_start, *next(encoded), *frame_end], np.int32)
        made.append(Made(tokens, signature(text) if recipe.signatures and not hit else None, hit))
    return made


def num_workers(asked: int) -> int:
    """`data.workers` -> processes; 0 is one a CPU that this process may use."""
    mine = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return asked or min(mine, MOST)


def make_all(
    batches: Iterable[list[Document]], recipe: Recipe, workers: int
) -> Generator[tuple[list[Document], list[Made]]]:
    """(batch, its results) in the order of `batches`, at most two batches a worker ahead. A UserError of `batches`
    comes after the results of what was read before: who stops earlier never meets it, with any number of workers."""
    mistakes: list[UserError] = []
    read = _until_mistake(batches, mistakes)
    first = list(islice(read, FEW))
    if workers == 1 or len(first) < FEW:
        for batch in chain(first, read):
            yield batch, make(batch, recipe)
    else:
        yield from _make_apart(chain(first, read), recipe, workers)
    if mistakes:
        raise mistakes[0]


def _until_mistake(batches: Iterable[list[Document]], mistakes: list[UserError]) -> Iterator[list[Document]]:
    try:
        yield from batches
    except UserError as error:
        mistakes.append(error)


def _make_apart(
    batches: Iterable[list[Document]], recipe: Recipe, workers: int
) -> Generator[tuple[list[Document], list[Made]]]:
    pool = [_Process(recipe) for _ in range(workers)]
    idle: SimpleQueue[_Process] = SimpleQueue()
    for process in pool:
        idle.put(process)

    def ask(batch: list[Document]) -> list[Made]:
        process = idle.get()
        try:
            return process.ask(batch)
        finally:
            idle.put(process)

    waiting: deque[tuple[list[Document], Future[list[Made]]]] = deque()
    threads = ThreadPoolExecutor(workers)
    try:
        for batch in batches:
            waiting.append((batch, threads.submit(ask, batch)))
            if len(waiting) > 2 * workers:
                done, result = waiting.popleft()
                yield done, result.result()
        while waiting:
            done, result = waiting.popleft()
            yield done, result.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for process in pool:
            process.end()


class _Process:
    """A worker: one batch at a time."""

    def __init__(self, recipe: Recipe) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "data.worker"],
            cwd=ROOT,
            env=os.environ | QUIET,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        _send(recipe, self.stdin)

    def ask(self, batch: list[Document]) -> list[Made]:
        """Raises what went wrong there; RuntimeError where the process is gone."""
        try:
            _send(batch, self.stdin)
            made, error = pickle.load(self.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as gone:
            status = self.process.wait()
            raise RuntimeError(f"a tokenising process ended with status {status} (-9: out of memory?)") from gone
        if error is not None:
            raise error
        return made

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.stdout.close()
        with suppress(BrokenPipeError):  # a batch that it never read
            self.stdin.close()


def _send(value: Any, stream: IO[bytes]) -> None:
    pickle.dump(value, stream, protocol=pickle.HIGHEST_PROTOCOL)
    stream.flush()


def serve() -> None:
    """Answers batches until stdin ends, which is when the one who asks is gone."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a scheduler's goes to the whole job, which ends in its own time
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    recipe = pickle.load(sys.stdin.buffer)
    while True:
        try:
            batch = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:  # a process border: whatever went wrong is raised by who asked
            answer: tuple[Any, Exception | None] = (make(batch, recipe), None)
        except UserError as error:
            answer = (None, error)
        except Exception:
            answer = (None, RuntimeError(traceback.format_exc()))
        _send(answer, answers)


if __name__ == "__main__":
    from data import worker  # not this copy of it, whose classes the other side does not know

    worker.serve()
