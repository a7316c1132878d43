"""Tools of a user's own, sound and unsound, for the runner's and the registry's tests."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from rl.tools.tool import Tool, ToolError

NOTHING: dict[str, Any] = {"type": "object", "properties": {}}
TEXT: dict[str, Any] = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}


class Echo(Tool):
    name, description, parameters = "echo", "Says it again.", TEXT

    async def call(self, text: str) -> str:
        return text


class Slow(Tool):
    """Notes when calls begin and end; `naps` says for how long."""

    name, description = "slow", "Sleeps."
    parameters: dict[str, Any] = {"type": "object", "properties": {"seconds": {"type": "number"}}}

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []
        self.cancelled = 0
        self.closed = 0

    async def call(self, seconds: float = 600.0) -> str:
        began = time.monotonic()
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.spans.append((began, time.monotonic()))
        return f"slept {seconds}"

    async def close(self) -> None:
        self.closed += 1


class Raises(Tool):
    """Raises what it was made with."""

    name, description, parameters = "raises", "Raises.", NOTHING

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error or KeyError("no such thing")
        self.closed = 0

    async def call(self) -> str:
        raise self.error

    async def close(self) -> None:
        self.closed += 1
        raise OSError("cannot close")


class Deaf(Tool):
    """Takes no notice of being cancelled, until it is let go."""

    name, description, parameters = "deaf", "Hangs.", NOTHING

    def __init__(self) -> None:
        self.let_go = asyncio.Event()

    async def call(self) -> str:
        while not self.let_go.is_set():
            try:
                await self.let_go.wait()
            except asyncio.CancelledError:
                continue
        return "at last"

    async def close(self) -> None:
        await asyncio.sleep(600)


class Returns(Tool):
    """Returns what it was made with."""

    name, description, parameters = "returns", "Returns.", NOTHING

    def __init__(self, result: Any = "x") -> None:
        self.result = result

    async def call(self) -> str:
        return self.result


class Anything(Tool):
    """Takes every JSON object, and shows it."""

    name, description = "anything", "Takes all."
    parameters: dict[str, Any] = {"type": "object", "additionalProperties": True}

    async def call(self, *args: Any, **arguments: Any) -> str:
        if "refuse" in arguments:
            raise ToolError(f"refused {arguments}")
        return repr(arguments)


class BadSchema(Echo):
    parameters = {"type": "object", "properties": {"text": {"type": "sting"}}}


class NoObject(Echo):
    parameters = {"type": "string"}


class BadName(Echo):
    name = "no name"


class Nameless(Tool):
    description, parameters = "Has no name.", NOTHING

    async def call(self) -> str:
        return ""


class NotAsync(Echo):
    def call(self, text: str) -> str:  # type: ignore[override]
        return text


class NoCall(Tool):
    name, description, parameters = "no_call", "Does nothing.", NOTHING


class Unmakeable(Echo):
    def __init__(self) -> None:
        raise RuntimeError("no luck")


class NotATool:
    pass


A_VALUE = 3
