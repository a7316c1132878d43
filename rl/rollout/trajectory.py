"""One sample that talks with tools, as it grows: the conversation, the row of tokens that goes on, and the rows that
are closed.

Token-in, token-out: inside a row nothing that the policy wrote is tokenised again; results are encoded and go behind
it. Where the context rule takes something away (V3.2: thoughts, at a user's message), or the context is managed, the
conversation is encoded anew and begins a row of its own, with fresh luck.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data.chat import said_message
from data.context import KEEP_ALL, ContextRule
from data.dsml import Turn
from rl.messages import CUT, RolloutRequest, Sample, TokenColumns, extended
from rl.rollout.context import DISCARDED, SUMMARY_REQUEST, discarded, with_summary
from rl.tools.record import CallRecord


@dataclass(frozen=True)
class Room:
    """What bounds a trajectory: tokens of a row, messages of the assistant, and what is done about a full context."""

    window: int
    max_turns: int
    rule: ContextRule
    management: str = "none"
    management_share: float = 0.8


def row_seed(seed: int, number: int) -> int:
    """63 bits for row `number` of a sample; row 0 has the sample's own."""
    if number == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest(), "little") >> 1


@dataclass
class Trajectory:
    """`messages`: the conversation that `request.prompt_ids` encodes. The encoders: messages -> ids of a prompt; what
    tools or the user said -> ids that go behind what the policy said."""

    request: RolloutRequest
    messages: list[dict[str, Any]]
    room: Room
    encode: Callable[..., list[int]]  # (messages, rule=None)
    encode_results: Callable[[Sequence[str]], list[int]]
    encode_question: Callable[[str], list[int]]
    prompt_ids: tuple[int, ...] = ()  # of the row that goes on
    earlier: list[TokenColumns] = field(default_factory=list)
    row: TokenColumns | None = None  # None: nothing is drawn of it yet
    turn: int = 0  # messages of the assistant so far
    thoughts: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    calls: list[CallRecord] = field(default_factory=list)
    resumed: bool = False  # a thought went on after a result
    num_malformed: int = 0  # messages whose calls nobody could read
    _has_read: bool = False  # the last thing was a tool's result
    summary_asked_at: int | None = None  # place of the message that asks for a summary, while its answer is awaited
    finish_reason: str | None = None
    answer: str | None = None  # what the assistant said last for the user; None: it never came to that

    def __post_init__(self) -> None:
        self.prompt_ids = self.request.prompt_ids

    @property
    def drawn(self) -> int:
        return sum(row.num_sampled for row in self.earlier) + self._drawn_here

    @property
    def _drawn_here(self) -> int:
        return 0 if self.row is None else self.row.num_sampled

    @property
    def ask(self) -> RolloutRequest:
        """The row as a request, with as many tokens as budget and window leave it."""
        here = len(self.prompt_ids) if self.row is None else len(self.row)
        left = min(self.request.max_new_tokens - self.drawn, self.room.window - here)
        return replace(
            self.request,
            prompt_ids=self.prompt_ids,
            seed=row_seed(self.request.seed, len(self.earlier)),
            max_new_tokens=self._drawn_here + left,
        )

    @property
    def begun(self) -> Sample | None:
        """The row as a sample that goes on; None where it begins."""
        return None if self.row is None else Sample(self.ask, self.row, "", CUT)

    def take(self, drawn: Sample, turn: Turn) -> None:
        """A message was drawn."""
        row, begins = drawn.tokens, self.row is None
        # an engine counts from 0 in every row
        self.row = replace(row, turns=[turn + self.turn for turn in row.turns]) if begins else row
        self.turn += 1
        self.said.append(drawn.text)
        self.thoughts.append(turn.reasoning)
        self.resumed = self.resumed or (self._has_read and bool(turn.reasoning.strip()))
        self._has_read = False
        if drawn.finish_reason == "stop":
            self.messages.append(said_message(turn))
        else:
            self.end("length" if self.drawn >= self.request.max_new_tokens else "context")

    def end(self, reason: str, answer: str | None = None) -> None:
        self.finish_reason, self.answer = reason, answer

    def read_results(self, results: Sequence[str], version: int, answered: bool = True) -> None:
        """What tools gave back; not `answered`: one line on a malformed call."""
        self._has_read = answered
        self.messages += [{"role": "tool", "content": text} for text in results]
        if self._at_an_end():
            return
        assert self.row is not None
        forks = "tool" in self.room.rule.forks_at
        ids = [] if forks else self.encode_results(results)
        size = len(self.encode(self.messages)) if forks else len(self.row) + len(ids)
        if self._is_full(size):
            self._manage()
        elif forks:
            self._fork()
        else:
            self.row = extended(self.row, ids, version, self.turn)

    def hear(self, content: str, version: int) -> None:
        """A message of the user's."""
        self.messages.append({"role": "user", "content": content})
        if self._at_an_end():
            return
        assert self.row is not None
        ids = self.encode_question(content)
        if "user" in self.room.rule.forks_at or self._is_full(len(self.row) + len(ids)):
            self._fork()
        else:
            self.row = extended(self.row, ids, version, self.turn)

    def begin_again(self, summary: str) -> None:
        """Goes on after the summary that it was asked for."""
        assert self.summary_asked_at is not None
        before, self.summary_asked_at = self.messages[: self.summary_asked_at], None
        if self._at_an_end():
            return
        if summary.strip():
            self.messages = with_summary(before, summary)
            self._fork()
        else:  # nothing was said: what there is of calls is worth more than an empty summary
            self._discard(before, DISCARDED["discard_75"])

    def _fork(self, rule: ContextRule | None = None) -> None:
        """Closes the row; the conversation, encoded anew, begins the next."""
        ids = tuple(self.encode(self.messages, rule))
        if len(ids) >= self.room.window:
            self.end("context")
            return
        assert self.row is not None
        self.earlier.append(self.row)
        self.prompt_ids, self.row = ids, None

    def _at_an_end(self) -> bool:
        if self.turn >= self.room.max_turns:
            self.end("turns")
        elif self.drawn >= self.request.max_new_tokens:
            self.end("length")
        return self.finish_reason is not None

    def _is_full(self, size: int) -> bool:
        share = 1.0 if self.room.management == "none" else self.room.management_share
        return size >= share * self.room.window

    def _manage(self) -> None:
        """Makes room, or ends where none can be made."""
        how = self.room.management
        if how == "summary":
            self.summary_asked_at = len(self.messages)
            self.messages.append({"role": "user", "content": SUMMARY_REQUEST})
            self._fork(KEEP_ALL)  # whoever sums up must see its thoughts
        elif how in DISCARDED:
            self._discard(self.messages, DISCARDED[how])
        else:
            self.end("context")

    def _discard(self, messages: Sequence[dict[str, Any]], share: float) -> None:
        self.messages = discarded(messages, share)
        if self._is_full(len(self.encode(self.messages))):  # the question alone, or what is left of the calls
            self.end("context")
        else:
            self._fork()
