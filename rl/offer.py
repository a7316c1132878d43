"""How a prompt is asked: the user's message, the tools that it is offered, the chat encoding, and where the tools of a
sample come from.

A problem of an environment is offered the environment's tools, any other prompt those that the run names
(`rl.tools.names`, `rl.tools.mcp`); with `use_tools=false` nothing, in all of the run or in a domain.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedTokenizerFast

from conf.schema import RLConfig
from data.chat import encode_prompt
from data.context import CONTEXT_RULES, ContextRule
from data.prompts import Prompt
from rl.env.environment import Environment, EnvProblem
from rl.env.registry import choose
from rl.messages import RolloutRequest
from rl.rewards.proof import generator_prompt
from rl.tools.loop_thread import LoopThread
from rl.tools.registry import open_tools, python_limits
from rl.tools.shared import Shared
from rl.tools.tool import Tool

Asked = Prompt | RolloutRequest  # both know domain, prompt, env and state


class Offer:
    """What this run offers; a context manager, which gives back what the tools share. folder: of the run, for logs."""

    def __init__(self, rl: RLConfig, tokenizer: PreTrainedTokenizerFast, folder: Path, rank: int = 0) -> None:
        self.rl, self.tokenizer = rl, tokenizer
        self.rule = CONTEXT_RULES[rl.tools.reasoning]
        self.shared = Shared(rl.tools, folder, rank)
        self._loop: LoopThread | None = None
        self._lock = threading.Lock()
        self._schemas: dict[str, list[dict[str, Any]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shared.close()
        if self._loop is not None:
            self._loop.close()

    @property
    def loop(self) -> LoopThread:
        """Where tools and environments run, for as long as the run."""
        with self._lock:
            if self._loop is None:
                self._loop = LoopThread("tools")
            return self._loop

    def open(self) -> None:
        """Makes what is dear now, so that a mistake ends the run before a model is built. UserError."""
        for view in self.rl.views:
            if view.env is not None:
                self._environment(view.env)
            elif view.offers_tools:
                open_tools(self.rl.tools.names, self.shared)

    def plays(self, asked: Asked) -> bool:
        """Whether its sample is a trajectory: it has tools, or an environment that looks at its end."""
        return bool(asked.env) or self.has_tools(asked)

    def has_tools(self, asked: Asked) -> bool:
        """Whether the policy is told of its tools and may call them."""
        of_domain = self.rl.of(asked.domain)
        return of_domain.use_tools and bool(asked.env or of_domain.tools.names or of_domain.tools.mcp)

    def environment(self, asked: Asked) -> Environment | None:
        return self._environment(asked.env) if asked.env else None

    def _environment(self, env: str) -> Environment:
        environment, _ = choose(env)
        if environment.wants_pool:
            environment.pool, environment.python_limits = self.shared.pool(), python_limits(self.rl.tools)
        return environment

    def tools(self, asked: Asked) -> list[Tool]:
        """A trajectory's own; those of an environment also where they are not offered, for its verifier."""
        environment = self.environment(asked)
        if environment is not None:
            return environment.tools(problem_of(asked))
        return open_tools(self.rl.tools.names, self.shared) if self.has_tools(asked) else []

    def schemas(self, asked: Asked) -> list[dict[str, Any]]:
        """What the prompt says of its tools: the same for all problems of an environment and for all other prompts."""
        if not self.has_tools(asked):
            return []
        if asked.env not in self._schemas:
            self._schemas[asked.env] = [tool.schema() for tool in self.tools(asked)]
        return self._schemas[asked.env]

    def messages(self, asked: Asked) -> list[dict[str, Any]]:
        """The conversation that the policy is to continue."""
        of_domain = self.rl.of(asked.domain)
        text = generator_prompt(asked.prompt) if of_domain.outcome == "proof" else asked.prompt
        found: list[dict[str, Any]] = [{"role": "user", "content": text}]
        tools = self.schemas(asked)
        return [{"role": "system", "content": "", "tools": tools}, *found] if tools else found

    def encode(self, messages: Sequence[dict[str, Any]], rule: ContextRule | None = None) -> list[int]:
        return encode_prompt(messages, self.tokenizer, context=rule or self.rule)


def problem_of(asked: Asked) -> EnvProblem:
    """What an environment has made the prompt of, without its key."""
    return EnvProblem(asked.prompt, asked.answer, "", asked.state)
