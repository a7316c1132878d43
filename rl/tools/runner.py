"""Runs the calls of one trajectory: nothing that a model writes or a tool does costs more than that call.

A call is found by name, its arguments are held against the tool's schema, it runs as a task of its own with a deadline,
and whatever happens its CallRecord holds text that the model reads. What costs the run is only what cannot be cut off:
a tool that blocks the event loop's thread (`time.sleep` where `asyncio.to_thread` belongs).

    box = ToolBox(tools, CallLimits())
    records = await box.run(calls)     # a message's calls, side by side; those of one tool one after another
    await box.close()
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from conf.errors import UserError, nearest
from data.calls import ToolCall
from rl.tools.plain import NotPlain, clean, cut, plain
from rl.tools.record import CallRecord
from rl.tools.tool import Tool, ToolError

GRACE_S = 2.0  # for a tool that was told to stop, and for its close() beyond that
MAX_NAME = 100  # characters of a tool's name in a record
MAX_ANSWER = 200_000  # characters that a tool hands in as the answer
MAX_REASON = 1000  # characters of an exception's text
SIMPLE_SCHEMA = {"type", "properties", "required", "title", "description", "$schema"}
Result = TypeVar("Result")
log = logging.getLogger("winnow.tools")


@dataclass(frozen=True)
class CallLimits:
    """Seconds of a call; calls and seconds of a trajectory; characters of a result."""

    timeout_s: float = 120.0
    max_calls: int = 20
    total_seconds: float = 600.0
    max_result_chars: int = 8000


class ToolBox:
    """The tools of one trajectory. UserError: two tools of one name, or a schema that is none."""

    def __init__(self, tools: Sequence[Tool], limits: CallLimits) -> None:
        self.tools = {tool.name: tool for tool in tools}
        if len(self.tools) < len(tools):
            names = [tool.name for tool in tools]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"two tools have the name {twice}: leave one out or rename it")
        self.limits = limits
        self.validators = {tool.name: validator(tool) for tool in tools}
        self.calls = 0
        self.seconds = 0.0  # with calls under way; those side by side count once
        self._stuck: dict[str, asyncio.Task[Any]] = {}  # calls that did not stop when told to, by tool
        self._closed = False

    async def run(self, calls: Sequence[ToolCall]) -> list[CallRecord]:
        """One record a call, in their order."""
        assert not self._closed, "the trajectory is over"
        began = time.monotonic()
        deadline = began + self.limits.total_seconds - self.seconds
        by_tool: dict[str, list[int]] = {}
        for index, call in enumerate(calls):
            by_tool.setdefault(call.name if call.name in self.tools else "", []).append(index)
        first = self.calls  # calls of this trajectory before these
        self.calls += len(calls)
        records: dict[int, CallRecord] = {}

        async def in_order(indices: Sequence[int]) -> None:
            for index in indices:
                records[index] = await self._one(calls[index], first + index, deadline)

        try:
            async with asyncio.TaskGroup() as group:  # waits for its tasks, also where this run is cancelled
                for indices in by_tool.values():
                    group.create_task(in_order(indices))
        finally:
            self.seconds += time.monotonic() - began
        return [records[index] for index in range(len(calls))]

    async def close(self) -> None:
        """Closes every tool, once; logs what goes wrong and waits no longer than a few GRACE_S."""
        if self._closed:
            return
        self._closed = True
        await asyncio.gather(*(self._close(tool) for tool in self.tools.values()))

    async def _one(self, call: ToolCall, number: int, deadline: float) -> CallRecord:
        began = time.monotonic()
        error = ended = False
        arguments: Any = None
        try:
            arguments = plain(call.arguments)
            self._check_budget(number, deadline - began)
            tool = self._checked(call.name, arguments)
            result = await self._call(tool, arguments, deadline - began)
            ended = tool.ends
        except NotPlain as reason:
            error, result = True, f"bad arguments: {reason}"
        except ToolError as reason:
            error, result = True, str(reason)
        except Exception as failure:  # the boundary: a tool may raise anything
            error, result = True, described(failure)
            log.warning("the tool %s failed: %s", call.name, result)
            log.debug("the tool %s failed", call.name, exc_info=True)
        if error:
            result = f"Error: {result}"
        # Cut before it is cleaned: a cut may part a pair of surrogates.
        text = clean(cut(result, MAX_ANSWER if ended else self.limits.max_result_chars))
        return CallRecord(clean(call.name[:MAX_NAME]), arguments, text, error, time.monotonic() - began, ended)

    def _check_budget(self, number: int, seconds_left: float) -> None:
        if number >= self.limits.max_calls:
            raise ToolError(f"the budget of {self.limits.max_calls} calls is used up: answer without further calls")
        if seconds_left <= 0:
            raise ToolError(self._no_time_left())

    def _no_time_left(self) -> str:
        return f"the budget of {self.limits.total_seconds:g} s for calls is used up: answer without further calls"

    def _checked(self, name: str, arguments: Any) -> Tool:
        """The tool. ToolError where there is none of this name, or the arguments are not what its schema wants."""
        tool = self.tools.get(name)
        if tool is None:
            near = nearest(name[:MAX_NAME], self.tools) if self.tools else "there are no tools"
            raise ToolError(f"there is no tool {name[:MAX_NAME]}: {near}")
        if name in self._stuck and not self._stuck[name].done():
            raise ToolError(f"{name} still hangs in an earlier call and cannot be used")
        if not isinstance(arguments, dict):
            raise ToolError(f"the arguments of {name} must be an object with the names and values of its parameters")
        wrong = _mismatch(self.validators[name], tool.parameters, arguments)
        if wrong:
            raise ToolError(f"bad arguments for {name}: {wrong}")
        return tool

    async def _call(self, tool: Tool, arguments: Mapping[str, Any], seconds_left: float) -> str:
        seconds = min(self.limits.timeout_s, seconds_left)
        task = asyncio.create_task(_guarded(tool.call(**arguments)))
        try:
            _, late = await asyncio.wait({task}, timeout=seconds)
        finally:
            if not task.done():
                await self._stop(tool.name, task)
        if late:
            reason = self._no_time_left() if seconds < self.limits.timeout_s else f"no result within {seconds:g} s"
            raise ToolError(f"{tool.name} was cut off: {reason}")
        if task.cancelled():
            raise ToolError(f"{tool.name} was cancelled from within")
        result = task.result()
        if not isinstance(result, str):
            raise TypeError(f"the tool returned a {type(result).__name__}, not text")
        return result

    async def _stop(self, name: str, task: asyncio.Task[Any]) -> None:
        """Cancels a task; one that does not end within GRACE_S is left behind, and its tool is not called again."""
        task.cancel()
        await asyncio.wait({task}, timeout=GRACE_S)
        if task.done():
            task.cancelled() or task.exception()  # looked at: asyncio would report it as never retrieved
        else:
            log.warning("the tool %s does not stop", name)
            self._stuck[name] = task

    async def _close(self, tool: Tool) -> None:
        if tool.name in self._stuck:
            await self._stop(tool.name, self._stuck[tool.name])
        task = asyncio.create_task(_guarded(tool.close()))
        try:
            _, late = await asyncio.wait({task}, timeout=GRACE_S)
        finally:
            if not task.done():
                await self._stop(tool.name, task)
        if late:
            log.warning("the tool %s did not close within %g s", tool.name, GRACE_S)
        elif not task.cancelled() and (failure := task.exception()) is not None:
            log.warning("the tool %s did not close: %s", tool.name, described(failure))


async def _guarded(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """A tool that calls sys.exit ends itself, not the loop."""
    try:
        return await coroutine
    except SystemExit as error:
        raise RuntimeError(f"the tool called exit({error.code!r})") from error


def described(failure: BaseException) -> str:
    """An exception in one line; of a group its first."""
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    try:
        text = " ".join(str(failure).split())
    except Exception:  # its __str__ is the tool's code
        text = ""
    kind = type(failure).__name__
    return cut(f"{kind}: {text}" if text else kind, MAX_REASON)


def validator(tool: Tool) -> Any:
    """A jsonschema validator of the tool's `parameters`. UserError where they are no JSON schema of an object."""
    try:
        text = json.dumps(tool.parameters, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the tool {tool.name}: parameters are no JSON ({described(error)}): write a schema") from error
    try:
        return _validator(text)
    except ValueError as error:
        raise UserError(
            f"the tool {tool.name}: parameters are no JSON schema ({error}): see json-schema.org"
        ) from error


@functools.lru_cache(maxsize=1024)  # each trajectory has tools of its own, of few kinds
def _validator(schema_text: str) -> Any:
    import jsonschema
    from referencing import Registry

    schema = json.loads(schema_text)
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise ValueError('its "type" is not "object"')
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(cut(" ".join(error.message.split()), 200)) from error
    return kind(schema, registry=Registry())  # an empty one: no "$ref" fetches anything


def _mismatch(checker: Any, schema: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    """What is wrong with the arguments, "" where nothing is."""
    import jsonschema

    error = jsonschema.exceptions.best_match(checker.iter_errors(arguments))
    if error is not None:
        where = ".".join(str(part) for part in error.absolute_path)
        return cut((f"{where}: " if where else "") + error.message, MAX_REASON)
    if set(schema) <= SIMPLE_SCHEMA:  # says no word about further properties: there are none
        names = schema.get("properties", {})
        for name in arguments:
            if name not in names:
                near = nearest(name[:MAX_NAME], names) if names else "it takes none"
                return f"there is no parameter {name[:MAX_NAME]}: {near}"
    return ""
