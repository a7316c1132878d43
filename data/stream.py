"""The endless stream of training sequences: sequence i is a pure function of (config, tokenizer, seed, split, i).

So any rank can make any sequence, the same global step holds the same tokens under every layout, and the position in
the data is one number. A sequence is of one source: of the text (`data.layout` says which documents it holds), of one
part of a mix, worked problems (`synthetic_share`), as many whole ones as fit, or long-context problems (`long_share`,
data/long_stream.py). The sources take turns, spread evenly, so a share of sequences is a share of tokens, text keeps
its full context, and every source has epochs of its own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.errors import UserError
from conf.schema import DataConfig
from data.corpus import Corpus, decode_targets, open_corpus
from data.layout import BestFit, Concat
from data.long_stream import LongProblems
from data.packing import PackedBatch, Piece, assemble
from data.sources import documents, parts
from data.split import SPLITS
from data.worker import encode_document

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerFast

    from data.sources import Document, Part

LONG, WORKED, TEXTS = 0, 1, 2  # whose turn it is; the sources of text follow one another
SHORTEST_PROBLEM = 9  # tokens of a worked problem at least: six that frame it, question, working, answer


@dataclass(frozen=True)
class Text:
    """One source of text: its tokens, and where they stand."""

    part: Part
    corpus: Corpus
    layout: Concat | BestFit

    def pieces(self, number: int) -> Iterator[Piece]:
        """What stands in this source's sequence `number`."""
        for document, start, end in self.layout.spans(number):
            begin, stop = (int(self.corpus.offsets[document + side]) for side in (0, 1))
            ids, targets = decode_targets(self.corpus.tokens[begin + start : min(begin + end + 2, stop)])
            yield Piece(ids, targets, end - start)


def chosen_documents(part: Part, lengths: np.ndarray) -> np.ndarray:
    """Numbers of the documents of a corpus that have the lengths asked for. `lengths`: tokens of each."""
    most = lengths.max() if part.max_tokens is None else part.max_tokens
    return np.flatnonzero((lengths >= part.min_tokens) & (lengths <= most))


def lay_out(part: Part, lengths: np.ndarray, split: str, seed: int) -> Concat | BestFit:
    """`lengths`: tokens of each document. UserError where none is of the lengths asked for."""
    cfg, chosen = part.cfg, chosen_documents(part, lengths)
    if not len(chosen):
        raise UserError(
            f"data.mix.{part.name} leaves none of {len(lengths)} documents, which have {lengths.min()} to"
            f" {lengths.max()} tokens: give other min_tokens or max_tokens"
        )
    if split == "train":
        long = lengths[chosen] >= cfg.long_documents.tokens
        chosen = np.repeat(chosen, np.where(long, cfg.long_documents.times, 1))
    if cfg.packing == "best_fit":
        return BestFit(lengths, chosen, cfg.seq_len, seed, cfg.max_split)
    return Concat(lengths, chosen, cfg.seq_len, seed)


def turns(index: int, shares: Sequence[float]) -> tuple[int, int]:
    """(which source gives sequence `index`, its how-manieth from 0). Each share is of what the ones before leave; the
    last takes the rest."""
    for source, share in enumerate(shares[:-1]):
        before = int(index * share)
        if int((index + 1) * share) > before:
            return source, before
        index -= before
    return len(shares) - 1, index


class TokenStream:
    """Packed sequences of `cfg.seq_len` tokens by global index, and the position of a run in them.

    `conversations`: rows must hold messages (SFT); what a user says is never a target, in any stage. `cache_dir` keeps
    the tokenised corpus. UserError: see `data.sources.documents` and `lay_out`.
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
        self.texts: list[Text] = []
        for part in parts(cfg):
            corpus = open_corpus(
                part.cfg, tokenizer, split, cache_dir=cache_dir, conversations=conversations, progress=progress
            )
            self.texts.append(Text(part, corpus, lay_out(part, np.diff(corpus.offsets), split, seed)))
        self.long = LongProblems(cfg, tokenizer, seed, split)
        if cfg.long_share:
            self.long.check(cfg.long_tasks, cfg.long_min, "data.long_min")
        weights = [text.part.weight for text in self.texts]
        whole = cfg.source == "synthetic" or cfg.long_share + cfg.synthetic_share >= 1
        worked = 1.0 if whole else cfg.synthetic_share / (1 - cfg.long_share)  # 0.3 / (1 - 0.7) would be below 1
        self.shares = [cfg.long_share, worked, *(one / sum(weights[place:]) for place, one in enumerate(weights))]

    @property
    def corpus(self) -> Corpus | None:
        """The tokens of a run with one source of text."""
        return self.texts[0].corpus if len(self.texts) == 1 else None

    def sequence(self, index: int) -> PackedBatch:
        """Sequence `index` >= 0 of the stream, the same for every caller."""
        assert index >= 0, index
        source, number = turns(index, self.shares)
        if source == LONG:
            pieces = self.long.sequence(number)
        elif source == WORKED:
            pieces = self._problems(number)
        else:
            pieces = self.texts[source - TEXTS].pieces(number)
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
        digests = [text.corpus.digest for text in self.texts] or ["synthetic"]
        whole = digests[0] if len(digests) == 1 else hashlib.sha256(json.dumps(digests).encode()).hexdigest()
        return {"next_sequence": self.position, "corpus": whole}

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
