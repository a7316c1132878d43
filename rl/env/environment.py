"""What an environment is (DeepSeek-V3.2, sec. 3.2.3): problems, tools, and a verifier that looks at the answer or at
the state that the tools were left in.

Problem `index` of (split, seed, level) is a function of these alone, as in data/tasks, and held-out problems are told
apart by their key (`data.split`). A problem carries all that tools and verifier need in `state`, so any process can
play it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from data.calls import ToolCall
from rl.tools.tool import Tool


@dataclass(frozen=True)
class EnvProblem:
    """`prompt` is the user's first message; `answer` the reference, "" where the end state decides; `key` what must not
    be in two splits; `state` JSON of the world and of what the verifier knows."""

    prompt: str
    answer: str
    key: str
    state: str = ""


@dataclass(frozen=True)
class Said:
    """One message of the assistant: a thought, then words for the user, calls, or both."""

    reasoning: str
    content: str = ""
    calls: tuple[ToolCall, ...] = ()


Solution = Generator[Said, Sequence[str], Said]  # yields messages with calls, is sent their results, returns the answer


class Environment(ABC):
    """Stateless and cheap to make: every process has one by name. What is dear (an index) is made once, where it is
    first used. `pool` of sandboxes (rl/sandbox) and `python_limits` (seconds of a call, calls): set by whoever opens a
    run, where `wants_pool`."""

    name: ClassVar[str]
    max_level: ClassVar[int]
    wants_pool: ClassVar[bool] = False
    pool: Any = None
    python_limits: tuple[float, int] = (117.0, 20)

    @abstractmethod
    def problem_at(self, index: int, split: str, seed: int, level: int, share: float) -> EnvProblem:
        """`share`: data.heldout. UserError where the split has no such problem."""

    @abstractmethod
    def tools(self, problem: EnvProblem) -> list[Tool]:
        """New instances for one trajectory, which closes them at its end."""

    @abstractmethod
    async def verify(self, problem: EnvProblem, answer: str, tools: Sequence[Tool]) -> float:
        """How well the problem is solved, in [0, 1]. `answer`: what the assistant said last, without its thought, ""
        where it never came to say it; `tools`: those of the trajectory, as its calls left them, not yet closed."""

    async def step(self, problem: EnvProblem, answer: str, tools: Sequence[Tool], turn: int) -> str | None:
        """The user's next message after user turn number `turn` (from 0) ended with `answer`; None ends it."""
        return None

    @abstractmethod
    def solve(self, problem: EnvProblem) -> Solution:
        """A scripted solver, for the cold start and as the proof that the problem can be solved by its tools alone."""
