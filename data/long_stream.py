"""Long-context problems as tokens: documents for training mixes, and single problems to measure on.

A sequence of the mix is filled with problems of lengths drawn log-uniformly, each a document of its own whose targets
are the answers (and the end of the sequence) alone. Short ones come first in no way: what a model learns early it
learns from them, since they are many.
"""

from __future__ import annotations

import hashlib
import math
import random
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from conf.errors import UserError
from conf.schema import DataConfig
from data.packing import Piece
from data.tasks.long import LongProblem, problem_at
from data.tokenizer import encode_texts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerFast


PROBES = 8  # problems of a task that must fit before a run begins
MOST_REMEMBERED = 200  # characters of a text whose ids are kept: a sentence, not a context said again


class LongProblems:
    """The problems of a split as ids."""

    def __init__(self, cfg: DataConfig, tokenizer: PreTrainedTokenizerFast, seed: int, split: str) -> None:
        self.cfg, self.seed, self.split = cfg, seed, split
        self.frame = [[] if i is None else [i] for i in (tokenizer.bos_token_id, tokenizer.eos_token_id)]

        def encode(text: str) -> list[int]:
            return encode_texts(tokenizer, [text])[0]

        remembered = lru_cache(maxsize=1 << 16)(encode)
        self._encode = lambda text: remembered(text) if len(text) <= MOST_REMEMBERED else encode(text)

    def problem(
        self, name: str, index: str | int, length: int, depth: float | None = None, questions: int = 1
    ) -> LongProblem:
        """See `data.tasks.long.problem_at`; `length` counts what frames a document as well."""
        room = length - sum(map(len, self.frame))
        count, share = lambda text: len(self._encode(text)), self.cfg.heldout
        return problem_at(name, index, self.split, self.seed, room, depth, count, questions=questions, share=share)

    def check(self, names: Sequence[str], length: int, key: str) -> None:
        """UserError, naming the `key` that gave the shortest length, where problems of a task do not fit it."""
        for name in names:
            for index in range(PROBES):
                try:
                    self.problem(name, f"fits/{index}", length)
                except UserError as error:
                    raise UserError(f"{key}={length} with the task {name}: {error}") from None

    def encoded(self, problem: LongProblem) -> tuple[np.ndarray, np.ndarray]:
        """(ids int64, targets bool: whether an answer or the end) of the whole document."""
        begin, end = self.frame
        parts = [(begin, False), *((self._encode(sentence), False) for sentence in problem.context)]
        for question in problem.questions:
            parts += [(self._encode(question.prompt), False), (self._encode(question.answer), True)]
        parts.append((end, True))
        ids = np.fromiter((i for part, _ in parts for i in part), np.int64)
        return ids, np.repeat([target for _, target in parts], [len(part) for part, _ in parts])

    def asked(self, problem: LongProblem) -> tuple[np.ndarray, np.ndarray]:
        """The same up to the first answer's end, which alone is a target: what accuracy is measured on."""
        ids, targets = self.encoded(problem)
        answer = len(self._encode(problem.answer))
        first = int(targets.argmax())
        targets[first + answer :] = False
        return ids[: first + answer], targets[: first + answer]

    def sequence(self, number: int) -> Iterator[Piece]:
        """The documents of mixed-in sequence `number`."""
        cfg = self.cfg
        noise = hashlib.sha256(f"long/{self.split}/{self.seed}/{number}".encode()).digest()
        rng, room, place = random.Random(noise), cfg.seq_len, 0
        shortest, longest = math.log(cfg.long_min), math.log(cfg.long_max or cfg.seq_len)
        while room >= cfg.long_min:
            length = round(math.exp(rng.uniform(shortest, longest)))
            name = cfg.long_tasks[rng.randrange(len(cfg.long_tasks))]
            problem = self.problem(name, f"{number}/{place}", min(length, room), questions=cfg.long_questions)
            ids, targets = self.encoded(problem)
            yield Piece(ids, targets, len(ids))
            room, place = room - len(ids), place + 1
