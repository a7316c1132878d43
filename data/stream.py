"""The endless stream of training sequences: sequence i is a pure function of (config, tokenizer, seed, split, i).

So any rank can make any sequence, the same global step holds the same tokens under every layout, and the position in
the data is one number. Text: the documents of an epoch in an order of their own, one after another, cut every T tokens;
the next epoch follows without a gap. Worked problems (`synthetic_share`) come as whole sequences, spread evenly
among the text's, so text keeps its full context; each holds as many whole problems as fit, each its own document.
Long-context problems (`long_share`, data/long_stream.py) come the same way.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.errors import UserError
from conf.schema import DataConfig
from data.corpus import Corpus, decode_targets, encode_document, open_corpus
from data.long_stream import LongProblems
from data.packing import PackedBatch, Piece, assemble
from data.sources import documents
from data.split import SPLITS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerFast

    from data.sources import Document

SHORTEST_PROBLEM = 9  # tokens of a worked problem at least: six that frame it, question, working, answer
KEPT_EPOCHS = 2  # orders held in memory: a sequence may span two epochs


class TokenStream:
    """Packed sequences of `cfg.seq_len` tokens by global index, and the position of a run in them.

    `conversations`: rows must hold messages (SFT); what a user says is never a target, in any stage. `cache_dir` keeps
    the tokenised corpus. UserError: see `data.sources.documents`.
    """

    def __init__(
        self,
        cfg: DataConfig,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        split: str = "train",
        *,
        cache_dir: str | Path | None = None,
        conversations: bool = False,
        progress: bool = False,
    ) -> None:
        assert split in SPLITS, split
        self.cfg, self.tokenizer, self.seed, self.split = cfg, tokenizer, seed, split
        self.position = 0  # global index of the next sequence
        self.long_share, self.long = cfg.long_share, LongProblems(cfg, tokenizer, seed, split)
        rest = 1.0 - cfg.long_share  # of which worked problems have the share:
        self.synthetic_share = 1.0 if cfg.source == "synthetic" or not rest else cfg.synthetic_share / rest
        self.corpus: Corpus | None = None
        if cfg.source != "synthetic":
            self.corpus = open_corpus(
                cfg, tokenizer, split, cache_dir=cache_dir, conversations=conversations, progress=progress
            )
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def sequence(self, index: int) -> PackedBatch:
        """Sequence `index` >= 0 of the stream, the same for every caller."""
        assert index >= 0, index
        long_before = int(index * self.long_share)
        if int((index + 1) * self.long_share) > long_before:
            return assemble(self.long.sequence(long_before), self.cfg.seq_len)
        index -= long_before
        arithmetic_before = int(index * self.synthetic_share)
        if int((index + 1) * self.synthetic_share) > arithmetic_before:
            pieces = self._problems(arithmetic_before)
        else:
            pieces = self._text(index - arithmetic_before)
        return assemble(pieces, self.cfg.seq_len)

    def take(self, count: int, rank: int = 0, world: int = 1) -> list[PackedBatch]:
        """The `count` sequences of this data-parallel rank in the next step of count * world, and moves past them all.

        Every rank calls it with the same `count`; the step holds the same sequences for the same count * world.
        """
        first = self.position + rank * count
        self.position += count * world
        return [self.sequence(index) for index in range(first, first + count)]

    def state(self) -> dict[str, Any]:
        """The position, for a checkpoint: plain numbers and strings."""
        return {"next_sequence": self.position, "corpus": self.corpus.digest if self.corpus else "synthetic"}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken. UserError if the data are other ones now."""
        here = self.state()["corpus"]
        if state["corpus"] != here:
            raise UserError(
                f"the data or the tokenizer changed since the checkpoint (digest {here[:12]}, then"
                f" {state['corpus'][:12]}): restore them, or start in a new output_dir"
            )
        self.position = int(state["next_sequence"])

    def _problems(self, number: int) -> Iterator[Piece]:
        """Whole problems of arithmetic sequence `number`; problems are numbered so that sequences share none."""
        most = max(1, self.cfg.seq_len // SHORTEST_PROBLEM)
        room = self.cfg.seq_len
        for count, document in enumerate(self._worked(number * most)):
            ids, targets = decode_targets(encode_document(document, self.tokenizer))
            if count == 0 and len(ids) > room:
                raise UserError(
                    f"data.seq_len={room} holds no worked problem of {len(ids)} tokens:"
                    f" raise it, or lower {'the levels of data.tasks' if self.cfg.tasks else 'data.operand_digits'}"
                )
            if len(ids) > room or count == most:
                return
            room -= len(ids)
            yield Piece(ids, targets, len(ids))

    def _worked(self, start: int) -> Iterator[Document]:
        return documents(replace(self.cfg, source="synthetic"), self.split, self.seed, start=start)

    def _epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(order of documents, where each starts in the epoch [documents + 1]) of an epoch."""
        assert self.corpus is not None
        if number not in self._epochs:
            order = np.random.default_rng([self.seed, number]).permutation(self.corpus.num_documents)
            starts = np.concatenate([[0], np.cumsum(np.diff(self.corpus.offsets)[order])])
            self._epochs[number] = (order, starts)
            while len(self._epochs) > KEPT_EPOCHS:
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def _text(self, number: int) -> Iterator[Piece]:
        """Tokens [number * T, (number + 1) * T) of the epochs laid end to end, as pieces of documents."""
        assert self.corpus is not None
        at, room, total = number * self.cfg.seq_len, self.cfg.seq_len, self.corpus.num_tokens
        while room:
            epoch, inside = divmod(at, total)
            order, starts = self._epoch(epoch)
            place = int(np.searchsorted(starts, inside, side="right")) - 1
            begin, stop = (int(self.corpus.offsets[order[place] + side]) for side in (0, 1))
            start = inside - int(starts[place])
            end = min(start + room, stop - begin)
            ids, targets = decode_targets(self.corpus.tokens[begin + start : min(begin + end + 2, stop)])
            yield Piece(ids, targets, end - start)
            at, room = at + end - start, room - (end - start)
