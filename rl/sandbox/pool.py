"""Sandboxes ready before they are asked for, and the sessions and programs that run in them.

A pool owns one background thread with one event loop, in which every sandbox lives; its coroutines may be awaited from
any loop in any thread. So one pool serves a whole run, though each iteration's rollout is an `asyncio.run` of its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, Self, TypeVar

from rl.sandbox.box import MARGIN_S, Box, BoxLost
from rl.sandbox.inside.supervisor import GRACE_S
from rl.sandbox.limits import Execution, Limits
from rl.sandbox.protection import Protection, find_protection

MAX_CODE = 1_000_000  # characters
Result = TypeVar("Result")
log = logging.getLogger(__name__)


class SandboxBusy(RuntimeError):
    """No session became free in time."""


class Session:
    """One isolated interpreter that keeps its variables, one call at a time; made by `SandboxPool.session`."""

    def __init__(self, pool: SandboxPool, box: Box) -> None:
        self._pool = pool
        self._box: Box | None = box
        self._turn = asyncio.Lock()
        self._lost: str | None = None  # the sandbox that went, and not told yet
        self._closed = False

    async def run(self, code: str, timeout_s: float | None = None) -> Execution:
        """Runs a cell. Never raises for what the code does; RuntimeError: the session is closed.

        Past its time it is interrupted, and where it does not end within half a second all its processes are killed.
        After a kill the next call has a fresh interpreter, and its output says so; files in /tmp stay.
        """
        return await self._pool._hop(self._run(code, timeout_s), self._abandon)

    async def close(self) -> None:
        """Ends the sandbox and frees its place. May be called more than once."""
        await self._pool._hop(self._close())

    def _abandon(self) -> None:
        if self._box is not None:
            self._box.kill()

    async def _run(self, code: str, timeout_s: float | None) -> Execution:
        async with self._turn:
            if self._closed:
                raise RuntimeError("the session is closed")
            if len(code) > MAX_CODE:
                return Execution("", f"ValueError: {len(code)} characters of code, the limit is {MAX_CODE}")
            started = time.monotonic()
            limit = timeout_s if timeout_s is not None else self._pool.limits.timeout_s
            try:
                if self._box is None:
                    box = await self._pool._take()
                    if self._closed:  # meanwhile
                        self._pool._close_later(box)
                        raise RuntimeError("the session is closed")
                    self._box = box
                request = {"do": "cell", "code": code, "timeout_s": limit}
                done = await self._box.ask(request, limit + GRACE_S + MARGIN_S)
            except BoxLost as error:
                self._drop(str(error))
                seconds = time.monotonic() - started
                late = seconds > limit
                return Execution("", f"the session was ended: {error}", late, "time" if late else "lost", seconds)
            except BaseException:
                self._drop("a call was cut off")
                raise
            if self._lost is not None:
                note = f"[the session was restarted, its variables and files are lost: {self._lost}]\n"
                done, self._lost = replace(done, output=note + done.output), None
            return done

    def _drop(self, reason: str) -> None:
        box, self._box, self._lost = self._box, None, reason
        if box is not None:
            box.kill()
            self._pool._close_later(box)

    async def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._box is not None:
            await self._box.close()
            self._box = None
        self._pool._left(self)


class SandboxPool:
    """`async with SandboxPool(Limits()) as pool: session = await pool.session()`; a plain `with` does as well.

    mode: see `find_protection`, which is asked when the pool opens. warm: sandboxes kept ready. sessions: how many may
    live at once; further ones wait for a place, `wait_s` at most (SandboxBusy), so that callers who hold one while they
    wait for another cannot wait for ever. Programs have places of their own, one a core, and never wait for a session.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        mode: str = "auto",
        warm: int = 4,
        sessions: int = 64,
        wait_s: float = 600.0,
    ) -> None:
        self.limits = limits or Limits()
        self.mode, self.warm, self.sessions, self.wait_s = mode, warm, sessions, wait_s
        self.protection: Protection | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop
        self._ready: deque[Box] = deque()
        self._live: set[Session] = set()
        self._filling: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    # -- opening and closing

    def open(self) -> Self:
        """Finds the protection and starts filling. Does nothing where it is open. UserError: no protection here."""
        if self._thread is not None:
            return self
        self.protection = find_protection(self.mode)
        self._loop = asyncio.new_event_loop()
        cores = len(os.sched_getaffinity(0))
        self._places, self._programs = asyncio.Semaphore(self.sessions), asyncio.Semaphore(cores)
        self._starting = asyncio.Semaphore(cores)
        # sandboxes die with the thread that started them
        self._thread = threading.Thread(target=self._loop.run_forever, name="sandboxes", daemon=True)
        self._thread.start()
        self._loop.call_soon_threadsafe(self._refill)
        return self

    def shut(self) -> None:
        """Ends every sandbox and waits until nothing of them is left. Blocks for some milliseconds a sandbox."""
        if self._thread is None:
            return
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._thread = None

    async def close(self) -> None:
        await asyncio.to_thread(self.shut)

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *error: object) -> None:
        self.shut()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.open)

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _shut(self) -> None:
        if self._filling is not None:
            self._filling.cancel()
            await asyncio.gather(self._filling, return_exceptions=True)
        boxes = [*self._ready, *(session._box for session in self._live if session._box is not None)]
        self._ready.clear()
        await asyncio.gather(*(box.close() for box in boxes))
        await asyncio.gather(*self._closing)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.gather(*self._closing)  # what those left

    # -- what callers await

    async def session(self) -> Session:
        """A session in a fresh sandbox. SandboxBusy: no place; RuntimeError: a sandbox does not start any more."""
        if self._thread is None:
            await asyncio.to_thread(self.open)
        work = asyncio.run_coroutine_threadsafe(self._session(), self._loop)
        try:
            return await asyncio.shield(asyncio.wrap_future(work))
        except asyncio.CancelledError:  # nobody will take it: it is closed as soon as it is there
            work.add_done_callback(self._return_unused)
            raise

    def _return_unused(self, work: Any) -> None:
        if not work.cancelled() and work.exception() is None:
            asyncio.run_coroutine_threadsafe(work.result()._close(), self._loop)

    async def _hop(self, work: Coroutine[Any, Any, Result], abandon: Any = None) -> Result:
        """Runs `work` in the pool's loop. Cancelled, it is cut off there as well, once `abandon` was called."""
        if self._thread is None:
            work.close()
            raise RuntimeError("the pool is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            if abandon is not None:
                self._loop.call_soon_threadsafe(abandon)
            future.cancel()  # it may be waiting for a new sandbox
            raise

    # -- in the pool's loop

    async def _session(self) -> Session:
        try:
            async with asyncio.timeout(self.wait_s):
                await self._places.acquire()
        except TimeoutError:
            raise SandboxBusy(f"all {self.sessions} sandbox sessions were in use for {self.wait_s:g} s") from None
        try:
            session = Session(self, await self._take())
        except BaseException as error:
            self._places.release()
            if isinstance(error, BoxLost):
                raise RuntimeError(f"no sandbox starts any more: {error}") from None
            raise
        self._live.add(session)
        return session

    def _close_later(self, box: Box) -> None:
        """Waits for the end of a killed sandbox beside everything else: a caller's time is up already."""
        task = asyncio.get_running_loop().create_task(box.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _left(self, session: Session) -> None:
        self._live.discard(session)
        self._places.release()

    async def _take(self) -> Box:
        """A fresh sandbox, a warm one where there is one. BoxLost: none starts."""
        while self._ready:
            box = self._ready.popleft()
            self._refill()
            if box.process.poll() is None:
                return box
            await box.close()
        self._refill()
        return await self._start()

    async def _start(self) -> Box:
        assert self.protection is not None
        async with self._starting:
            return await Box.start(self.protection, self.limits)

    def _refill(self) -> None:
        if self._filling is None or self._filling.done():
            self._filling = asyncio.get_running_loop().create_task(self._fill())

    async def _fill(self) -> None:
        while len(self._ready) < self.warm:
            try:
                self._ready.append(await self._start())
            except BoxLost as error:  # whoever needs one next meets it too, and tells
                log.warning("a sandbox did not start: %s", error)
                return

    async def _program(self, source: str, stdin: str, timeout_s: float) -> Execution:
        if len(source) > MAX_CODE or len(stdin) * 4 > self.limits.tmp_mib << 20 or len(stdin) > MAX_CODE:
            return Execution("", f"ValueError: {len(source)} and {len(stdin)} characters are too long to run")
        async with self._programs:
            box: Box | None = None
            started = time.monotonic()
            try:
                box = await self._take()
                request = {"do": "program", "source": source, "stdin": stdin, "timeout_s": timeout_s}
                return await box.ask(request, timeout_s + GRACE_S + MARGIN_S)
            except BoxLost as error:
                return Execution("", f"ended: {error}", False, "lost", time.monotonic() - started)
            finally:
                if box is not None:
                    await box.close()


async def run_program(pool: SandboxPool, source: str, stdin: str, timeout_s: float) -> Execution:
    """Runs a whole Python program, as `python program.py < stdin`, in a sandbox that nothing ran in before and nothing
    will after: it sees neither another test nor who compares.

    output: its stdout alone; error: None where it left with status 0, else its stderr's last line.
    """
    if pool._thread is None:
        await asyncio.to_thread(pool.open)
    return await pool._hop(pool._program(source, stdin, timeout_s))
