"""Tasksets of the package `verifiers` (0.4, its v1 API) as environments: `verifiers:ID`, after `pip install
winnow[verifiers]` and that of the taskset's own package.

The task gives prompt, tools and rewards; who plays is our policy, and its tools run in this process. So what is
supported is the plain case: a text prompt, toolsets of Python methods, rewards that look at the trace. The rest is
refused by name before anything runs: multi-agent environments, tasks in containers or with set-up of their own,
rewards that need a runtime, judges (they call a model; rl.outcome=judge is ours), tool servers elsewhere.

The rewards' weighted sum, over the sum of the positive weights, within [0, 1], is the verdict. What the trace lacks:
the policy's words before its answer (its calls and their results are there), tokens, timing, stop conditions.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from conf.errors import UserError
from data.split import digest, in_split
from rl.env.environment import Environment, EnvProblem, Solution
from rl.tools.tool import Tool, ToolError

MAX_TASKS = 100_000  # of one taskset; an infinite one is cut here
LEFT_ALONE = ("setup", "finalize", "stage_verifier")  # hooks of a task that act on its runtime


@functools.lru_cache(maxsize=8)
def load_taskset(taskset_id: str) -> tuple[Any, tuple[Any, ...]]:
    """(taskset, its tasks), once in a process. UserError: no such package, or a kind that is not supported."""
    try:
        from verifiers.v1.utils import loaders
    except ImportError as error:
        raise UserError(
            f"verifiers:{taskset_id} needs the package verifiers: pip install 'winnow[verifiers]'"
        ) from error
    try:
        kind = loaders.taskset_class(taskset_id)
        if loaders.environment_class(taskset_id).__name__ != "SingleAgentEnv":
            raise UserError(f"verifiers:{taskset_id} is no plain taskset: it brings an environment of its own")
        taskset = kind(loaders.taskset_config_type(taskset_id)(id=taskset_id))
        tasks = tuple(itertools.islice(taskset, MAX_TASKS))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"verifiers:{taskset_id} cannot be loaded ({reason}): install its package") from error
    if not tasks:
        raise UserError(f"verifiers:{taskset_id} has no tasks")
    return taskset, tasks


def refusal(taskset: Any, task: Any) -> str:
    """Why the task is not supported, "" where it is."""
    import verifiers.v1 as vf

    data = task.data
    prompt = data.prompt
    if not isinstance(prompt, str) and not _plain_messages(prompt):
        return "its prompt is no text"
    if task.NEEDS_CONTAINER or data.image:
        return "it runs in a container"
    own = [name for name in LEFT_ALONE if getattr(type(task), name) is not getattr(vf.Task, name)]
    if own:
        return f"it has {own[0]}() for a runtime"
    if task.config.judges:
        return "it has judges, which call a model"
    rewards = task.hooks("reward")
    if not rewards:
        return "it has no rewards"
    for reward in rewards:
        if "runtime" in inspect.signature(reward).parameters:
            return f"its reward {reward.__name__} needs a runtime"
    toolsets = _toolsets(taskset, task)
    for toolset in toolsets:
        if toolset.config.url or type(toolset).register is not vf.Toolset.register:
            return f"its tools {type(toolset).__name__} run elsewhere"
    if sum(type(toolset.state) is not vf.State for toolset in toolsets) > 1:
        return "two of its toolsets share a state"
    return ""


def _plain_messages(prompt: Any) -> bool:
    """A system message at most, then one of the user, both text."""
    if not isinstance(prompt, Sequence):
        return False
    roles = [message.role for message in prompt]
    return roles in (["user"], ["system", "user"]) and all(isinstance(message.content, str) for message in prompt)


def _toolsets(taskset: Any, task: Any) -> list[Any]:
    return [served.toolset for served in _served(taskset, task)]


def _served(taskset: Any, task: Any) -> list[_Served]:
    """New instances: those of the taskset, then those of the task."""
    shared = [_Served(toolset, None) for toolset in type(taskset).toolsets(taskset.config)]
    return shared + [_Served(toolset, task.data) for toolset in type(task).toolsets(task.config)]


def _prompt(data: Any) -> str:
    return "\n\n".join(part for part in (data.system_prompt, data.prompt_text) if part)


class _Served:
    """A toolset of one trajectory, set up at its first call. `data`: its task's, None where it serves all tasks."""

    def __init__(self, toolset: Any, data: Any) -> None:
        self.toolset, self.data = toolset, data
        self.lock = asyncio.Lock()
        self.ready = False

    async def set_up(self) -> None:
        async with self.lock:
            if not self.ready:
                await self.toolset.setup()
                if self.data is not None:
                    await self.toolset.setup_task(self.data)
                self.ready = True


class ToolsetTool(Tool):
    """One method of a toolset. `done`: the trajectory's calls so far, of all its tools: (name, arguments, result)."""

    def __init__(self, served: _Served, method: Any, done: list[tuple[str, str, str]]) -> None:
        from mcp.server.mcpserver.tools.base import Tool as McpTool

        prefix, bare = served.toolset.server_name, getattr(method, "tool_name", None) or method.__name__
        self.name = f"{prefix}_{bare}" if prefix else bare
        self.made = McpTool.from_function(method, name=self.name, description=(method.__doc__ or "").strip() or None)
        self.description, self.parameters = self.made.description, self.made.parameters
        self.served, self.done = served, done

    async def call(self, **arguments: Any) -> str:
        """Its result as the package's own server would give it: text as it is, else JSON."""
        await self.served.set_up()
        run = self.made.fn_metadata.call_fn_with_arg_validation
        result = "cut off"
        try:
            found = await run(self.made.fn, self.made.is_async, arguments, None)
            result = found if isinstance(found, str) else json.dumps(found, default=str)
        except Exception as error:  # the toolset's own code may raise anything, and the rewards see it as a result
            result = f"{type(error).__name__}: {error}"
            raise ToolError(result) from error
        finally:
            self.done.append((self.name, json.dumps(arguments), result))
        return result


class VerifiersEnvironment(Environment):
    """Of one taskset. A task that is not supported is a UserError when it is asked for."""

    name = "verifiers"
    max_level = 1

    def __init__(self, taskset_id: str) -> None:
        self.taskset_id = taskset_id

    def problem_at(self, index: int, split: str, seed: int, level: int, share: float) -> EnvProblem:
        """The tasks of a split in an order of `seed`, over and over; the key is the prompt's, as in data/sources."""
        order = _order(self.taskset_id, split, seed, share)
        if not order:
            raise UserError(f"data.heldout={share:g} leaves no verifiers:{self.taskset_id} in the {split} split")
        number = order[index % len(order)]
        taskset, tasks = load_taskset(self.taskset_id)
        reason = refusal(taskset, tasks[number])
        if reason:
            raise UserError(f"verifiers:{self.taskset_id}, task {number}, is not supported: {reason}")
        prompt = _prompt(tasks[number].data)
        return EnvProblem(prompt, "", digest(" ".join(prompt.split())), json.dumps({"task": number}))

    def tools(self, problem: EnvProblem) -> list[Tool]:
        from verifiers.v1.utils.decorators import discover_decorated

        taskset, task = self._task(problem)
        done: list[tuple[str, str, str]] = []
        return [
            ToolsetTool(served, method, done)
            for served in _served(taskset, task)
            for method in discover_decorated(served.toolset, "tool")
        ]

    async def verify(self, problem: EnvProblem, answer: str, tools: Sequence[Tool]) -> float:
        """Raises what a reward raises, and ValueError for one that is no finite number: that is no wrong answer."""
        _, task = self._task(problem)
        trace = _trace(task, answer, [tool for tool in tools if isinstance(tool, ToolsetTool)])
        await task.score(trace, None)
        return total(trace.rewards)

    def solve(self, problem: EnvProblem) -> Solution:
        raise UserError(f"verifiers:{self.taskset_id} has no scripted solver: its traces must come from a model")

    def _task(self, problem: EnvProblem) -> tuple[Any, Any]:
        taskset, tasks = load_taskset(self.taskset_id)
        return taskset, tasks[json.loads(problem.state)["task"]]


def total(rewards: Mapping[str, Any]) -> float:
    """{name: reward with score and weight} -> [0, 1]."""
    if any(one is None or not math.isfinite(one.score) for one in rewards.values()):
        raise ValueError(f"the rewards {', '.join(rewards)} are not all finite numbers")
    most = sum(max(0.0, one.weight) for one in rewards.values())
    reached = sum(one.score * one.weight for one in rewards.values())
    return min(1.0, max(0.0, reached / most)) if most else 0.0


@functools.lru_cache(maxsize=32)
def _order(taskset_id: str, split: str, seed: int, share: float) -> tuple[int, ...]:
    _, tasks = load_taskset(taskset_id)
    keys = [digest(" ".join(_prompt(task.data).split())) for task in tasks]
    numbers = [number for number, key in enumerate(keys) if in_split(key, split, share)]
    random.Random(f"verifiers/{taskset_id}/{split}/{seed}").shuffle(numbers)
    return tuple(numbers)


def _trace(task: Any, answer: str, tools: Sequence[ToolsetTool]) -> Any:
    """The trajectory as verifiers' rewards see it."""
    import verifiers.v1 as vf
    from verifiers.v1.state import state_cls

    states = [tool.served.toolset.state for tool in tools if type(tool.served.toolset.state) is not vf.State]
    messages: list[tuple[Any, bool]] = []  # message, whether the policy said it
    prompt = task.data.prompt
    if task.data.system_prompt:
        messages.append((vf.SystemMessage(content=task.data.system_prompt), False))
    messages += [(vf.UserMessage(content=prompt), False)] if isinstance(prompt, str) else [(m, False) for m in prompt]
    for number, (name, arguments, result) in enumerate(tools[0].done if tools else []):
        call = vf.ToolCall(id=f"call_{number}", name=name, arguments=arguments)
        messages.append((vf.AssistantMessage(tool_calls=[call]), True))
        messages.append((vf.ToolMessage(tool_call_id=call.id, content=result, name=name), False))
    messages.append((vf.AssistantMessage(content=answer), True))
    nodes = [
        vf.MessageNode(parent=number - 1 if number else None, message=message, sampled=said)
        for number, (message, said) in enumerate(messages)
    ]
    return vf.Trace(
        task=vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
        agent=vf.AgentInfo(config=vf.AgentConfig()),
        nodes=nodes,
        state=states[0] if states else state_cls(type(task))(),
        is_completed=True,
        ok=True,
    )
