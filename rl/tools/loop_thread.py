"""An event loop in a thread of its own, for what outlives one call of the trainer: tools' coroutines, MCP clients.

Nothing waits for what a tool leaves behind: a coroutine that does not stop when told to goes on in this loop, a thread
that `asyncio.to_thread` started is a daemon. `asyncio.run` would wait for both at its end, for ever.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import Any, TypeVar

Result = TypeVar("Result")
CLOSE_S = 5.0
LOOK_S = 0.5  # between looks at whether a wait is still wanted


class _Daemons(ThreadPoolExecutor):
    """A daemon thread a call: the interpreter's end does not join it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # the caller's, as an executor hands it on
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future


class LoopThread:
    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(_Daemons(max_workers=1))  # the number means nothing here
        self.thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self.thread.start()

    def wait(self, coroutine: Coroutine[Any, Any, Result], check: Callable[[], object] = lambda: None) -> Result:
        """From another thread, blocking. What `check` raises meanwhile, or Ctrl-C, cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            while True:
                try:
                    return future.result(LOOK_S)
                except NotYet:
                    if future.done():  # its own TimeoutError
                        raise
                    check()
        except BaseException:
            future.cancel()
            raise

    async def ask(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """From another loop; cancelled here, it is cancelled there."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.loop))

    def close(self) -> None:
        """Cancels what runs; what does not stop is left behind."""

        async def stop() -> None:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0)  # they see it
            self.loop.stop()

        asyncio.run_coroutine_threadsafe(stop(), self.loop)
        self.thread.join(CLOSE_S)
        if not self.thread.is_alive():  # else a tool blocks it, which no one can stop
            self.loop.close()
