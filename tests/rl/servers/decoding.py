"""A model that decodes for whoever asks: one thread, one batch that requests join and leave between two tokens.

All that touches the model is a command to that thread, so weights change between two tokens of what is in work, which
goes on with the cache that the old weights wrote (a real server that is told to forget reads it again).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from data.tokenizer import load_tokenizer
from model import Transformer
from model.generate import Ask, Generation, Sampling, _Batch
from model.hf import load_weights, read_config
from model.hf_names import slots
from rl.rollout.native import text_of
from rl.stop import StopStrings

RECORD = frozenset({"experts", "selected"})


@dataclass(eq=False)
class Work:
    """One request: `answer` gets the generation and the spans (label, start, end) of its weights."""

    id: str
    ask: Ask
    sampling: Sampling
    stop: StopStrings
    eos_ids: frozenset[int]
    answer: Future[tuple[Generation, list[tuple[str, int, int]]]] = field(default_factory=Future)
    begun_by: list[tuple[str, int]] = field(default_factory=list)  # label, tokens drawn before it


class _Running(_Batch):
    """The native engine's batch, whose places are taken by whoever comes."""

    def __init__(self, net: Transformer, sampling: Sampling, attention: str, places: int, length: int) -> None:
        self.works: dict[int, Work] = {}
        self.num_tokens = 0  # drawn so far
        filler = Ask((0,), 0, length - 1)
        super().__init__(net, [filler] * places, sampling, -1, attention, self._ends, places, lambda kind: None)
        self.asks, self.found = [], []
        self.waiting.clear()

    def _ends(self, number: int, ids: list[int]) -> bool:
        work = self.works[number]
        return ids[-1] in work.eos_ids or work.stop.ended_by_last(ids)

    def add(self, work: Work) -> None:
        number = len(self.asks)
        self.works[number] = work
        self.asks.append(work.ask)
        self.found.append(None)
        self.waiting.append(number)

    @property
    def has_work(self) -> bool:
        return bool(self.works)

    def advance(self) -> list[int]:
        """One token for everybody -> numbers of those that are finished."""
        self._admit()
        if not self.running.any():
            return []
        self.num_tokens += int(self.running.sum())
        places = self._draw()
        self.position[places] = 0  # a free place runs along, and costs what its position costs
        return [self.asked[place] for place in places]

    def drawn(self) -> dict[int, int]:
        """Number of each request -> tokens drawn."""
        live = self.running.nonzero().squeeze(1).tolist()
        return dict.fromkeys(self.works, 0) | {self.asked[place]: int(self.step[place]) for place in live}

    def break_off(self, number: int) -> None:
        if number in self.waiting:
            self.waiting.remove(number)
            self.found[number] = Generation([], [], "abort")
            return
        place = next(p for p in self.running.nonzero().squeeze(1).tolist() if self.asked[p] == number)
        self._finish(place, "abort")
        self.running[place] = False
        self.position[place] = 0

    def take(self, number: int) -> tuple[Work, Generation]:
        found, self.found[number] = self.found[number], None
        assert found is not None
        return self.works.pop(number), found


class Decoding:
    """`places`: requests that decode at a time. `length`: of a request with its answer at most. `label`: of the weights
    that it starts with."""

    def __init__(
        self, folder: str | Path, places: int = 16, length: int = 512, attention: str = "sparse", label: str = "default"
    ) -> None:
        config = read_config(folder, mtp="drop")
        with torch.device("meta"):
            self.net = Transformer(config)
        load_weights(self.net, folder)
        self.net.requires_grad_(False)
        self.tokenizer = load_tokenizer(str(folder))
        self.places, self.length, self.attention, self.label = (
            places,
            min(length, config.max_position_embeddings),
            attention,
            label,
        )
        self.paused = ""  # the mode, while it is
        self._batches: dict[Sampling, _Running] = {}
        self._commands: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._drained: list[Future[None]] = []
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    # From other threads

    def submit(
        self, id: str, ids: Sequence[int], seed: int, tokens: int, sampling: Sampling, stop: Sequence[str],
        eos_ids: Sequence[int],
    ) -> Work:  # fmt: skip
        """ValueError for what will never fit."""
        if not ids or not all(0 <= word < self.net.config.vocab_size for word in ids):
            raise ValueError("the prompt is empty or holds a word that the model does not have")
        if tokens < 1 or len(ids) + tokens > self.length:
            raise ValueError(f"{len(ids)} tokens and {tokens} to draw do not fit max_model_len={self.length}")
        strings = StopStrings(stop, partial(text_of, self.tokenizer))
        kept = Sampling(sampling.temperature, sampling.top_p, sampling.top_k, RECORD)
        work = Work(id, Ask(list(ids), seed, tokens), kept, strings, frozenset(eos_ids))
        self._commands.put(lambda: self._add(work))
        return work

    def pause(self, mode: str) -> Future[None]:
        """abort | wait | keep -> done when nothing is decoded any more."""
        done: Future[None] = Future()
        self._commands.put(lambda: self._pause(mode, done))
        return done

    def resume(self) -> None:
        self.call(lambda: setattr(self, "paused", ""))

    def abort(self, ids: Sequence[str] | None = None) -> int:
        """Breaks these off, or all -> how many."""
        return self.call(lambda: self._abort(ids))

    def call(self, action: Callable[[], Any]) -> Any:
        """Runs it between two tokens."""
        done: Future[Any] = Future()

        def command() -> None:
            try:
                done.set_result(action())
            except Exception as error:  # the caller's
                done.set_exception(error)

        self._commands.put(command)
        return done.result()

    def load(self, folder: str, label: str) -> None:
        self.call(lambda: load_weights(self.net, folder))
        self.relabel(label)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """By Hugging Face's names."""
        self.call(lambda: self._write(tensors))

    def relabel(self, label: str) -> None:
        self.call(lambda: self._relabel(label))

    def forget(self) -> None:
        """Prompts that other weights have read."""
        self.call(lambda: [batch.read.clear() for batch in self._batches.values()])

    def checksums(self) -> dict[str, str]:
        state = self.net.state_dict()
        return self.call(
            lambda: {name: f"{crc32(value.contiguous().numpy().tobytes()):08x}" for name, value in state.items()}
        )

    @property
    def has_work(self) -> bool:
        return self.call(lambda: any(batch.has_work for batch in self._batches.values()))

    @property
    def num_tokens(self) -> int:
        """Drawn so far."""
        return sum(batch.num_tokens for batch in list(self._batches.values()))

    def close(self) -> None:
        self._commands.put(None)
        self._thread.join(10)

    # In the thread

    def _run(self) -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            while True:
                busy = (self.paused in ("", "wait")) and any(batch.has_work for batch in self._batches.values())
                try:
                    command = self._commands.get(block=not busy)
                except queue.Empty:
                    self._advance()
                    continue
                if command is None:
                    return
                command()
                self._settle()

    def _advance(self) -> None:
        for batch in self._batches.values():
            if batch.has_work:
                for number in batch.advance():
                    self._answer(batch, number)
        self._settle()

    def _settle(self) -> None:
        if self._drained and not any(batch.has_work for batch in self._batches.values()):
            for done in self._drained:
                done.set_result(None)
            self._drained = []

    def _add(self, work: Work) -> None:
        batch = self._batches.get(work.sampling)
        if batch is None:
            batch = _Running(self.net, work.sampling, self.attention, self.places, self.length)
            self._batches[work.sampling] = batch
        work.begun_by.append((self.label, 0))
        batch.add(work)

    def _answer(self, batch: _Running, number: int) -> None:
        work, found = batch.take(number)
        size = len(found.ids)
        ends = [start for _, start in work.begun_by[1:]] + [size]
        spans = [(label, start, end) for (label, start), end in zip(work.begun_by, ends, strict=True) if end > start]
        work.answer.set_result((found, spans))

    def _pause(self, mode: str, done: Future[None]) -> None:
        self.paused = mode
        if mode == "abort":
            self._abort(None)
        if mode == "keep":
            done.set_result(None)
        else:
            self._drained.append(done)

    def _abort(self, ids: Sequence[str] | None) -> int:
        count = 0
        for batch in self._batches.values():
            for number in [n for n, work in batch.works.items() if ids is None or work.id in ids]:
                batch.break_off(number)
                self._answer(batch, number)
                count += 1
        return count

    def _relabel(self, label: str) -> None:
        self.label = label
        for batch in self._batches.values():
            for number, drawn in batch.drawn().items():
                batch.works[number].begun_by.append((label, drawn))

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        state = self.net.state_dict()
        places = {slot.hf_name: slot for slot in slots(self.net, self.net.config)}
        for name, value in tensors.items():
            slot = places[name]
            target = state[slot.ours] if slot.expert is None else state[slot.ours][slot.expert]
            target.copy_(value)
