"""`python`: a stateful interpreter, as a notebook has one, in a session of the sandbox (DeepSeek-V3.2, sec. 3.2.1:
a call may take 120 s, and there are 20 of them).

The session is taken from the pool at the first call, so a trajectory that computes nothing holds none. An exception of
the code is a result like any other, with its traceback; only a call without an orderly end is an error.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Protocol

from rl.tools.tool import Tool, ToolError

CLOSE_S = 1.0  # for the session of a call that was cut off from outside


class Outcome(Protocol):
    """rl.sandbox.Execution. `output`: all that was printed, the traceback and the last expression's value; `killed`:
    why the interpreter is gone, with all its state."""

    @property
    def output(self) -> str: ...
    @property
    def error(self) -> str | None: ...
    @property
    def timed_out(self) -> bool: ...
    @property
    def killed(self) -> str | None: ...


class Session(Protocol):
    async def run(self, code: str, timeout_s: float | None = None) -> Any:
        """An Outcome."""

    async def close(self) -> None: ...


class Pool(Protocol):
    async def session(self) -> Any:
        """A Session."""


class PythonTool(Tool):
    """One interpreter a trajectory; its variables stay from call to call. `timeout_s`: seconds of a call, which should
    end before the runner's, so that the interpreter is interrupted and not lost."""

    name = "python"
    description = (
        "Runs Python code in a stateful interpreter, as a notebook does: variables stay from call to call; what is"
        " printed and the value of the last expression come back. No network, no files from outside."
    )
    parameters: dict[str, Any] = {
        "type": "object",
        "properties": {"code": {"type": "string", "description": "Python source."}},
        "required": ["code"],
    }

    def __init__(self, pool: Pool, timeout_s: float = 120.0, max_executions: int = 20) -> None:
        self.pool, self.timeout_s, self.max_executions = pool, timeout_s, max_executions
        self.executions = 0
        self._session: Session | None = None
        self._lost = False  # the state that earlier calls made, and the model has not been told

    async def call(self, code: str) -> str:
        if self.executions >= self.max_executions:
            raise ToolError(f"{self.max_executions} executions are used up: answer without further ones")
        self.executions += 1
        try:
            if self._session is None:
                self._session = await self.pool.session()
            outcome = await self._session.run(code, timeout_s=self.timeout_s)
        except BaseException:  # cut off by the runner, or the sandbox failed: what the session holds is unknown
            await self._drop()
            raise
        note = "(a fresh interpreter: earlier variables and imports are lost)\n" if self._lost else ""
        self._lost = False
        return note + self._told(outcome)

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _drop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            self._lost = True
            with contextlib.suppress(Exception):  # it failed already, and that is what the model is told
                await asyncio.wait_for(session.close(), CLOSE_S)

    def _told(self, outcome: Outcome) -> str:
        """The result. ToolError: the call had no orderly end."""
        shown = [outcome.output.rstrip("\n")] if outcome.output.strip() else []
        if outcome.error is not None and outcome.error.rstrip(": ") not in outcome.output:
            shown.append(outcome.error)
        state = "variables and imports are lost, the next call starts afresh" if outcome.killed else "the state is kept"
        if outcome.timed_out:
            shown.append(f"the code ran for longer than {self.timeout_s:g} s and was ended; {state}")
        elif outcome.killed:
            shown.append(f"the interpreter was ended ({outcome.killed}); {state}")
        text = "\n".join(shown) or "(no output)"
        if outcome.timed_out or outcome.killed:
            raise ToolError(text)
        return text
