"""Tools of MCP servers: processes that speak the Model Context Protocol over stdin and stdout.

A server runs once a rank and is shared by its trajectories; what it remembers, it remembers for all of them. Its client
(the official `mcp` package) belongs to one event loop, and a rollout has a new one each iteration, so clients live in
a loop of their own, in a background thread; a call crosses over by `run_coroutine_threadsafe` and `wrap_future`.

A server that dies costs the calls that were under way in it (or, where it died idle, the next one); the call after
starts it anew. One that does not come up, or dies FEW_LIVES times without a result in between, is left alone for
PAUSE_S, and calls fail at once. After a call without a reply in time the server must list its tools within PROBE_S, or
it is taken for hung and replaced. Of the environment it gets ALLOWED and nothing else, so no key or token; what it
writes to stderr goes to `mcp.*.log` in the run's folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shlex
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from conf.errors import UserError
from rl.tools.loop_thread import LoopThread
from rl.tools.runner import described
from rl.tools.tool import Tool, ToolError

ALLOWED = (
    *(
        "HOME",
        "LANG",
        "LC_ALL",
        "LOGNAME",
        "PATH",
        "PYTHONPATH",
        "SHELL",
        "TERM",
        "TMPDIR",
        "TZ",
        "USER",
        "VIRTUAL_ENV",
    ),
)
START_S = 60.0  # imports of a server on a busy machine, its greeting and the list of its tools
PROBE_S = 5.0
CLOSE_S = 10.0  # the client itself waits 2 s for an orderly end, then sends SIGTERM, and SIGKILL after 2 s more
FEW_LIVES = 3
PAUSE_S = 30.0
MAX_PAGES = 100  # of a list of tools
Result = TypeVar("Result")
log = logging.getLogger("winnow.tools")


class _Life:
    """One process of a server, from its start to its end. Its task enters and leaves the client, as anyio wants it."""

    def __init__(self, parameters: Any, log_path: Path) -> None:
        self.ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()  # the client
        self.over = asyncio.Event()
        self.probed = False  # a probe is under way
        self.task = asyncio.create_task(self._live(parameters, log_path))

    async def _live(self, parameters: Any, log_path: Path) -> None:
        from mcp import Client, stdio_client

        try:
            async with contextlib.AsyncExitStack() as stack:
                errors = stack.enter_context(log_path.open("a", encoding="utf-8"))
                async with asyncio.timeout(START_S):
                    transport = stdio_client(parameters, errlog=errors)
                    client = await stack.enter_async_context(Client(transport, cache=None))
                self.ready.set_result(client)
                await self.over.wait()
        except Exception as failure:  # the boundary to a foreign process: it may end in any way
            if self.ready.done():
                log.debug("an MCP server ended: %s", described(failure))
            else:
                self.ready.set_exception(failure)
        finally:
            self.over.set()
            self.ready.cancel()


class McpServer:
    """One command. Everything but the constructor runs in the background loop."""

    def __init__(self, command: str, log_path: Path, timeout_s: float) -> None:
        self.command, self.log_path, self.timeout_s = command, log_path, timeout_s
        self.life: _Life | None = None
        self.short_lives = 0  # in a row, without a result
        self.retry_at = 0.0  # time.monotonic
        self.old: set[asyncio.Task[None]] = set()

    async def client(self) -> tuple[_Life, Any]:
        """The running server's client, started if there is none. Raises what the start raises; ToolError in a pause."""
        if self.life is None or self.life.over.is_set():
            if self.short_lives >= FEW_LIVES and time.monotonic() < self.retry_at:
                raise ToolError("the tool's server keeps dying and is left alone for a while: try other tools")
            self.retry_at = time.monotonic() + PAUSE_S
            self.short_lives += 1
            self.life = _Life(self._parameters(), self.log_path)
        life = self.life
        return life, await asyncio.shield(life.ready)  # whoever waits and is cut off leaves the start to the others

    async def list_tools(self) -> list[Any]:
        """Every tool, as mcp's Tool."""
        _, client = await self.client()
        return await asyncio.wait_for(self._listed(client), START_S)

    async def call(self, name: str, arguments: dict[str, Any]) -> str:
        from mcp import MCPError
        from mcp_types import CONNECTION_CLOSED, REQUEST_TIMEOUT

        life: _Life | None = None
        try:
            life, client = await self.client()
            reply = await client.call_tool(name, arguments, read_timeout_seconds=self.timeout_s)
        except asyncio.CancelledError:  # the runner's deadline
            if life is not None:
                self._probe_soon(life)
            raise
        except MCPError as error:
            if error.code == CONNECTION_CLOSED:
                if life is not None:
                    self._end(life)
                raise ToolError("the tool's server died in this call; the next call starts it anew") from error
            if error.code == REQUEST_TIMEOUT and life is not None:
                self._probe_soon(life)
                raise ToolError(f"the tool's server gave no result within {self.timeout_s:g} s") from error
            raise ToolError(error.message) from error
        except (OSError, TimeoutError) as error:
            raise ToolError(f"the tool's server does not start ({type(error).__name__})") from error
        self.short_lives = 0
        text = _text(reply)
        if reply.is_error:
            raise ToolError(text)
        return text

    async def close(self) -> None:
        if self.life is not None:
            self._end(self.life)
        if self.old:
            _, late = await asyncio.wait(self.old, timeout=CLOSE_S)
            for task in late:
                task.cancel()
            if late:
                log.warning("the MCP server %s does not end", self.command)

    def _parameters(self) -> Any:
        from mcp import StdioServerParameters

        program, *arguments = shlex.split(self.command)
        environment = {name: os.environ[name] for name in ALLOWED if name in os.environ}
        return StdioServerParameters(command=program, args=arguments, env=environment)

    async def _listed(self, client: Any) -> list[Any]:
        found: list[Any] = []
        cursor = None
        for _ in range(MAX_PAGES):
            page = await client.list_tools(cursor=cursor)
            found += page.tools
            cursor = page.next_cursor
            if cursor is None:
                return found
        raise ValueError(f"its list of tools has more than {MAX_PAGES} pages")

    def _end(self, life: _Life) -> None:
        """Lets a life come to its end without waiting for it."""
        life.over.set()
        if not life.ready.done():  # still starting: nobody listens to `over`
            life.task.cancel()
        self.old.add(life.task)
        life.task.add_done_callback(self.old.discard)

    def _probe_soon(self, life: _Life) -> None:
        """Ends a life that answers nothing any more."""

        async def probe() -> None:
            try:
                await asyncio.wait_for(self._listed(life.ready.result()), PROBE_S)
            except Exception:  # whatever it is, it gave no list of its tools
                log.warning("the MCP server %s hangs and is replaced", self.command)
                self._end(life)
            life.probed = False

        if life.probed:
            return
        life.probed = True
        task = asyncio.create_task(probe())
        self.old.add(task)
        task.add_done_callback(self.old.discard)


class McpTool(Tool):
    """One tool of a server. Calls of different trajectories run side by side in it."""

    def __init__(
        self, loop: LoopThread, server: McpServer, name: str, description: str, parameters: dict[str, Any]
    ) -> None:
        self.loop, self.server = loop, server
        self.name, self.description, self.parameters = name, description, parameters

    async def call(self, **arguments: Any) -> str:
        return await self.loop.ask(self.server.call(self.name, arguments))


class McpServers:
    """The servers of one rank, started by the first `tools()`.

    commands: one shell-like line a server, split as a shell would, run without one; folder: for their logs.
    """

    def __init__(self, commands: Sequence[str], folder: Path, rank: int = 0, timeout_s: float = 120.0) -> None:
        self.commands, self.folder, self.rank, self.timeout_s = tuple(commands), folder, rank, timeout_s
        self._loop: LoopThread | None = None
        self._servers: list[McpServer] = []
        self._listed: list[tuple[McpServer, Any]] = []
        self._lock = threading.Lock()

    def tools(self) -> list[Tool]:
        """New instances for a trajectory. UserError: a server that does not start; blocks where it is the first."""
        with self._lock:
            if self._loop is None and self.commands:
                self._start()
            loop = self._loop
        if loop is None:
            return []
        return [
            McpTool(loop, server, tool.name, tool.description or "", tool.input_schema) for server, tool in self._listed
        ]

    def close(self) -> None:
        """Ends the processes, within a few seconds."""
        with self._lock:
            loop, self._loop = self._loop, None
            if loop is not None:
                loop.wait(self._end())
                loop.close()

    async def _end(self) -> None:
        await asyncio.gather(*(server.close() for server in self._servers))
        self._servers, self._listed = [], []

    def _start(self) -> None:
        try:
            import mcp  # noqa: F401
        except ModuleNotFoundError as error:
            raise UserError("rl.tools.mcp needs the package mcp: pip install 'winnow[tools]'") from error
        self.folder.mkdir(parents=True, exist_ok=True)
        loop = LoopThread("mcp")
        for number, command in enumerate(self.commands):
            log_path = self.folder / f"mcp.{number}.rank_{self.rank}.log"
            try:
                server = McpServer(command, log_path, self.timeout_s)
                self._servers.append(server)
                self._listed += [(server, tool) for tool in loop.wait(server.list_tools())]
            except Exception as failure:  # a foreign program at its start
                loop.wait(self._end())
                loop.close()
                raise UserError(
                    f"rl.tools.mcp={command}: the server does not start ({described(failure)}):"
                    f" run the command yourself, and see {log_path}"
                ) from failure
        self._loop = loop


def _text(reply: Any) -> str:
    """What a model can read of a result: its texts, and a word for each picture or sound."""
    from mcp_types import TextResourceContents

    parts = []
    for block in reply.content:
        if block.type == "text":
            parts.append(block.text)
        elif block.type == "resource" and isinstance(block.resource, TextResourceContents):
            parts.append(block.resource.text)
        else:
            parts.append(f"[{block.type} left out]")
    if not parts and reply.structured_content is not None:
        parts.append(json.dumps(reply.structured_content, ensure_ascii=False))
    return "\n".join(parts) or "(no output)"
