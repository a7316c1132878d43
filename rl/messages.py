"""What the parts of RL hand to one another: requests to a rollout engine, samples from it, their rewards, and what
training saw of them.

A sample keeps columns over all its tokens, prompt included, so that one index means one token in every column: id,
loss mask, behaviour log-prob, weight version, turn. Columns that replay what the sampler did (kept vocabulary set,
routed experts) are None where the engine does not record them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

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


@dataclass(frozen=True)
class TokenColumns:
    """One entry a token, prompt first; every column that is not None has the same length."""

    ids: list[int]
    loss_mask: list[bool]  # True where the policy sampled the token
    behaviour_logprobs: list[float]  # under the distribution it was drawn from; 0 where not sampled, NaN where missing
    weight_versions: list[int]  # iteration of the weights that drew it
    turns: list[int]  # number of the assistant's turn; the prompt belongs to the turn it opens
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


@dataclass(frozen=True)
class Sample:
    """One answer to one request, as the engine drew it and the graders judged it."""

    request: RolloutRequest
    tokens: TokenColumns
    text: str  # what was sampled, without the end-of-sequence token or the stop string and what lies behind it
    finish_reason: str  # stop (end of sequence or a stop string) | length | cut, which is never graded
    reward_parts: Mapping[str, float] = field(default_factory=dict)  # raw, see rl/rewards/total.py
    outcome: float | None = None  # the part that says whether the answer is right
    reward: float | None = None  # made of the parts; None: not graded, or a grader failed

    @property
    def num_sampled(self) -> int:
        """Tokens the policy drew, end of sequence included: |o_i|."""
        return sum(self.tokens.loss_mask)


@dataclass(frozen=True)
class Trace:
    """What the loss saw of a sample at its own mini-batch, before that one's step; lists over its sampled tokens."""

    logprobs: list[float]  # log pi_theta
    ratios: list[float]  # pi_theta / pi_old
    clipped: list[bool]
    masked: bool  # eq. 8
    off_policy_kl: float  # d of eq. 9


@dataclass(frozen=True)
class Stretch:
    """What one call drew of a sample: its tokens from `start` on, up to which the weights then read it first."""

    sample: Sample  # as it was after the call
    start: int

    @property
    def num_tokens(self) -> int:
        return len(self.sample.tokens) - self.start
