"""What the parts of RL hand to one another: requests to a rollout engine, samples from it, their rewards, and what
training saw of them.

A sample keeps columns over all its tokens, prompt included, so that one index means one token in every column: id,
loss mask, behaviour log-prob, weight version, turn. Columns that replay what the sampler did (kept vocabulary set,
routed experts) are None where the engine does not record them. Where the context begins anew in the middle of a sample
(a user's message drops the thoughts before it) what was drawn until then is a row of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rl.tools.record import CallRecord

CUT = "cut"  # finish reason of a sample that has drawn its tokens of an iteration and goes on in the next


@dataclass(frozen=True)
class RolloutRequest:
    """One sample to draw. Its randomness is `seed` alone, whichever process or batch draws it."""

    # place of the prompt among the `prompts_per_step` of the whole world in this iteration, plus `prompts_per_step`
    # for every prompt that held the place before and was left out (dynamic sampling)
    prompt_index: int
    sample_index: int  # place in the prompt's group
    domain: str
    prompt: str
    answer: str  # the reference answer
    prompt_ids: tuple[int, ...]
    seed: int
    max_new_tokens: int  # end of sequence included
    rubric: str = ""  # what a judge goes by; "": the row has none
    task: str = ""  # of data/tasks, whose grader knows the prompt; "": none
    env: str = ""  # NAME:LEVEL of the environment that the prompt is a problem of; "": none
    state: str = ""  # of the problem, see `EnvProblem`


@dataclass(frozen=True)
class TokenColumns:
    """One entry a token, prompt first; every column that is not None has the same length."""

    ids: list[int]
    loss_mask: list[bool]  # True where the policy sampled the token
    behaviour_logprobs: list[float]  # under the distribution it was drawn from; 0 where not sampled, NaN where missing
    weight_versions: list[int]  # iteration of the weights that drew it
    turns: list[int]  # number of the assistant's message; prompt and tool results belong to the one they open
    kept_sets: list[list[int]] | None = None  # words that top-p and top-k kept; [] where nothing was drawn: all
    # [tokens, MoE layer, slot] int16 expert ids and [tokens, layer, k] int32 positions; -1 where a token did not run
    routed_experts: Tensor | None = field(default=None, compare=False)
    selected: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        columns = {name: column for name, column in vars(self).items() if column is not None}
        lengths = {name: len(column) for name, column in columns.items()}
        assert len(set(lengths.values())) == 1, f"columns differ in length: {lengths}"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_sampled(self) -> int:
        return sum(self.loss_mask)

    @property
    def open_message(self) -> int:
        """Where the message begins that the row ends in the middle of; its length where it ends with a prompt or with
        tool results."""
        start = len(self)
        while start and self.loss_mask[start - 1]:
            start -= 1
        return start

    def messages(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """(first, last + 1) of each run of sampled tokens from `start` on: what the assistant said at a stretch."""
        first = None
        for at in range(start, len(self) + 1):
            sampled = at < len(self) and self.loss_mask[at]
            if sampled and first is None:
                first = at
            elif not sampled and first is not None:
                yield first, at
                first = None


def prompt_columns(ids: Sequence[int], version: int, turn: int = 0) -> TokenColumns:
    """A row that nothing is drawn of yet."""
    size = len(ids)
    return TokenColumns([*ids], [False] * size, [0.0] * size, [version] * size, [turn] * size)


def extended(row: TokenColumns, ids: Sequence[int], version: int, turn: int) -> TokenColumns:
    """The row with tokens behind it that the policy did not draw and that have not run."""
    more = prompt_columns(ids, version, turn)
    columns: dict[str, Any] = {
        name: column + getattr(more, name)
        for name, column in vars(row).items()
        if isinstance(column, list) and name != "kept_sets"
    }
    return TokenColumns(
        **columns,
        kept_sets=None if row.kept_sets is None else row.kept_sets + [[] for _ in ids],
        routed_experts=_not_run(row.routed_experts, len(ids)),
        selected=_not_run(row.selected, len(ids)),
    )


def _not_run(record: Tensor | None, size: int) -> Tensor | None:
    return None if record is None else torch.cat([record, record.new_full((size, *record.shape[1:]), -1)])


@dataclass(frozen=True)
class Sample:
    """One answer to one request, as the engine drew it and the graders judged it."""

    request: RolloutRequest
    tokens: TokenColumns  # of several rows the last
    # what was sampled, without the end-of-sequence token or the stop string and what lies behind it; where tools were
    # at hand all thoughts, and behind `</think>` the answer, if it came to one
    text: str
    # stop (end of sequence or a stop string) | length | turns, context (no more of them) | cut, which is never graded
    finish_reason: str
    earlier: tuple[TokenColumns, ...] = ()  # rows before the last one
    said: tuple[str, ...] = ()  # texts of all the assistant's messages, where tools were at hand
    calls: tuple[CallRecord, ...] = ()
    resumed: bool = False  # a thought went on after a tool's result
    num_malformed: int = 0  # messages whose calls nobody could read
    verdict: float | None = None  # of the environment's verifier, in [0, 1]
    verdict_error: str = ""  # why there is none
    reward_parts: Mapping[str, float] = field(default_factory=dict)  # raw, see rl/rewards/total.py
    outcome: float | None = None  # the part that says whether the answer is right
    reward: float | None = None  # made of the parts; None: not graded, or a grader failed

    @property
    def num_sampled(self) -> int:
        """Tokens the policy drew, ends of sequence included: |o_i|."""
        return sum(row.num_sampled for row in self.rows)

    @property
    def drawn_by(self) -> list[int]:
        """Iteration of the weights that drew each of its sampled tokens."""
        return [v for row in self.rows for drawn, v in zip(row.loss_mask, row.weight_versions, strict=True) if drawn]

    @property
    def rows(self) -> tuple[TokenColumns, ...]:
        """In the order they were drawn in."""
        return (*self.earlier, self.tokens)


@dataclass(frozen=True)
class Trace:
    """What the loss saw of a sample at its own mini-batch, before that one's step; lists over its sampled tokens, of
    all its rows."""

    logprobs: list[float]  # log pi_theta
    ratios: list[float]  # pi_theta / pi_old
    clipped: list[bool]
    masked: bool  # eq. 8; of a row at least
    off_policy_kl: float  # d of eq. 9; the largest of its rows


@dataclass(frozen=True)
class Stretch:
    """What one call drew of a sample: its tokens from `start` on, up to which the weights then read it first."""

    sample: Sample  # as it was after the call
    start: int  # in its first row; a sample that goes on has one

    @property
    def messages(self) -> Iterator[tuple[int, int]]:
        """(first, last + 1) of each message in its row, which the weights had read up to `first`."""
        for number, row in enumerate(self.sample.rows):
            yield from row.messages(0 if number else self.start)

    @property
    def num_tokens(self) -> int:
        return sum(stop - first for first, stop in self.messages)
