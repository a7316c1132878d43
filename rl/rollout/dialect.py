"""What the clients of both servers share: how a request is put, what an answer must hold, and how an answer's records
come into our columns. `vllm.py` and `sglang.py` each speak one protocol through it.

Each protocol changes between releases, so a server's version is asked first and chooses what reads its answers; a
version that nobody has looked at is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import ModelConfig
from model.generate import Generation, Sampling
from rl.rollout.server_api import Failed, Refused, ServerApi

QUICK_S = 30.0  # that an answer may take which needs no decoding and no weights
PROBE_TOKENS = 4
MOST_LOGPROB = 1e-3  # rounding lifts a log-prob above 0
LEAST_LOGPROB = -9998.0  # vLLM writes -9999 where it has none, or one that is no number
# what an answer of another shape than was looked for raises while it is read
ODD = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, EOFError, BadZipFile)
NO_ROUTE = (404, 405)
ABORT = "abort"  # finish reason of what a server broke off; its tokens are good


@dataclass(frozen=True)
class Wanted:
    """How tokens are drawn, and what must come back beside them."""

    sampling: Sampling
    model: ModelConfig
    eos_id: int
    stop: tuple[str, ...] = ()
    kept: bool = False  # the words that were in the running
    experts: bool = False
    selected: bool = False


@dataclass(frozen=True)
class Drawn:
    """What one request brought. `generation.finish_reason` may be `ABORT`; `versions`: the server's label of the
    weights that drew each token."""

    generation: Generation
    versions: list[str]


class Dialect(Protocol):
    """One protocol. Its coroutines raise what `server_api` names."""

    name: str

    async def health(self, api: ServerApi) -> None:
        """Raises where the server is there and unwell. Never waits for the end of a pause."""
        ...

    async def version(self, api: ServerApi) -> str: ...

    def path(self, wanted: Wanted) -> str:
        """Of the route that draws."""
        ...

    def body(self, ids: Sequence[int], seed: int, tokens: int, wanted: Wanted) -> dict[str, Any]:
        """The request for up to `tokens` tokens behind `ids`."""
        ...

    def read(self, answer: Mapping[str, Any], ids: Sequence[int], wanted: Wanted) -> Drawn:
        """Raises one of `ODD` where something is missing or odd."""
        ...

    async def probe(self, api: ServerApi, wanted: Wanted) -> None:
        """Asks for a few tokens. UserError, with the flag to start it with, where the server keeps back what is
        wanted."""
        ...

    async def weight_version(self, api: ServerApi) -> str: ...

    async def pause(self, api: ServerApi, mode: str, timeout_s: float) -> None:
        """mode: `abort` (what is in work comes back as far as it is) or `keep` (it goes on after `resume`, once the new
        weights have read it again)."""
        ...

    async def resume(self, api: ServerApi) -> None: ...

    async def load(self, api: ServerApi, folder: str, timeout_s: float) -> None:
        """Reads the Hugging Face folder into the running model, which is paused, and forgets cached prefixes; its
        weights keep their label."""
        ...

    async def stamp(self, api: ServerApi, label: str) -> None:
        """From now on its weights have this label. Every rank goes by it, so it comes after all else has gone well."""
        ...

    async def checksum(self, api: ServerApi, timeout_s: float) -> Any:
        """Of the weights as the server holds them; None where it cannot say."""
        ...

    async def world_size(self, api: ServerApi) -> int:
        """Processes that take part in a broadcast. UserError where it cannot be one of several."""
        ...

    async def join(self, api: ServerApi, group: Mapping[str, Any], rank_offset: int, timeout_s: float) -> None:
        """Meets rank 0 in a group: `host`, `port`, `world_size`, `backend`, and `unique_id` of a bare NCCL
        communicator (or None)."""
        ...

    async def receive(self, api: ServerApi, tensors: Mapping[str, tuple[str, list[int]]], timeout_s: float) -> None:
        """Takes these tensors (name -> dtype, shape), broadcast one after another meanwhile."""
        ...

    async def begin_receiving(self, api: ServerApi, timeout_s: float) -> None:
        """Once before the first bucket. Refused while one that broke off is open, which `leave` ends."""
        ...

    async def end_receiving(self, api: ServerApi, timeout_s: float) -> None:
        """Once behind the last; cached prefixes are forgotten."""
        ...

    async def leave(self, api: ServerApi) -> None:
        """Out of the group, and of an update that broke off."""
        ...


def refuse_version(name: str, url: str, version: str, treat_as: str | None, known: Sequence[tuple[str, str]]) -> None:
    """UserError unless `version` lies in one of the ranges `known` (from, before), or `treat_as` does."""
    asked = version if treat_as is None else treat_as
    number = _numbers(asked)
    if any(_numbers(low) <= number < _numbers(high) for low, high in known):
        return
    ranges = " or ".join(f"{low} up to, not including, {high}" for low, high in known)
    if treat_as is not None:
        raise UserError(f"rl.servers.treat_as={treat_as} is no version of {name} that is known: give one of {ranges}")
    raise UserError(
        f"{url} is {name} {version}, whose protocol is not known here ({ranges} is): run another version, or give"
        f" rl.servers.treat_as={known[-1][0]} if it speaks like that one"
    )


def _numbers(version: str) -> tuple[int, ...]:
    """ "0.33.1.dev4+g1" -> (0, 33, 1)."""
    found = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", version)
    return tuple(int(part or 0) for part in found.groups()) if found else ()


def experts_of(record: np.ndarray, rows: int, model: ModelConfig) -> Tensor:
    """A server's record of all layers, [rows, L, K] -> ours, of the MoE layers, [rows, M, K] int16. ValueError where
    it has another shape or names an expert that there is not."""
    shape = (rows, model.num_hidden_layers, model.num_experts_per_tok)
    if record.shape != shape:
        raise ValueError(f"routed experts of shape {list(record.shape)}, not {list(shape)}")
    found = torch.from_numpy(np.ascontiguousarray(record[:, model.first_k_dense_replace :]).astype(np.int64))
    if len(found) and found.numel() and not 0 <= int(found.min()) <= int(found.max()) < model.n_routed_experts:
        raise ValueError("an expert that the model does not have")
    return found.to(torch.int16)


def checked(drawn: Drawn, wanted: Wanted) -> Drawn:
    """ValueError where the parts of an answer do not fit one another."""
    found, size = drawn.generation, len(drawn.generation.ids)
    if found.finish_reason not in ("stop", "length", ABORT):
        raise ValueError(f"finish reason {found.finish_reason!r:.40}")
    if not size and found.finish_reason != ABORT:
        raise ValueError("no token")
    if len(found.logprobs) != size or len(drawn.versions) != size:
        raise ValueError(f"{size} tokens, {len(found.logprobs)} log-probs, {len(drawn.versions)} weight versions")
    if not all(LEAST_LOGPROB < value <= MOST_LOGPROB for value in found.logprobs):  # false of nan
        raise ValueError("a log-prob that is no number, or above 0")
    if not all(0 <= word < wanted.model.vocab_size for word in found.ids):
        raise ValueError("a word that the model does not have")
    if size and wanted.kept:
        if found.kept is None or len(found.kept) != size:
            raise ValueError("kept words are missing")
        if any(word not in kept for word, kept in zip(found.ids, found.kept, strict=True)):
            raise ValueError("a word that was drawn and not kept")
    if size and wanted.experts and found.experts is None:
        raise ValueError("routed experts are missing")
    if size and wanted.selected and found.selected is None:
        raise ValueError("selected positions are missing")
    return drawn


def spans(found: Sequence[Mapping[str, Any]], size: int) -> list[str]:
    """Label of each token, from spans {version, start, end} over the output, `end` not in it. ValueError unless they
    cover it."""
    labels: list[str] = []
    for span in found:
        if int(span["start"]) != len(labels):
            raise ValueError("weight versions leave tokens out")
        labels += [str(span["version"])] * (int(span["end"]) - len(labels))
    if len(labels) != size:
        raise ValueError(f"weight versions of {len(labels)} tokens, not of {size}")
    return labels


def read_answer(dialect: Dialect, answer: Mapping[str, Any], ids: Sequence[int], wanted: Wanted, url: str) -> Drawn:
    """`dialect.read`, checked; Failed where the answer is not what it must be."""
    try:
        return checked(dialect.read(answer, ids, wanted), wanted)
    except ODD as error:
        raise unreadable(url, error) from error


def unreadable(url: str, error: Exception) -> Failed:
    return Failed(f"{url}: an answer that cannot be read ({type(error).__name__}: {error})")


def refuse_missing(url: str, flags: Sequence[str]) -> None:
    """UserError where a server lacks some."""
    if flags:
        raise UserError(f"{url} keeps back what the trainer repeats: start it with {' '.join(flags)}")


async def unless_refused(asked: Awaitable[dict[str, Any]], statuses: Collection[int]) -> dict[str, Any] | None:
    """The answer; None where a server says by one of these that it has no such route."""
    try:
        return await asked
    except Refused as refusal:
        if refusal.status not in statuses:
            raise
        return None
