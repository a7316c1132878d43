"""One running sandbox, seen from the host: started, asked, killed. Everything here runs in one event loop.

What comes out of it is hostile: a frame has a largest size, is JSON of one shape, and anything else ends the sandbox
(`BoxLost`). Reading is asynchronous, and since the supervisor cuts output there is never much to read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from typing import Any

from rl.sandbox.inside import frames
from rl.sandbox.limits import Execution, Limits
from rl.sandbox.protection import Protection, environment

START_TIMEOUT_S = 20.0  # on a machine that is very busy
MARGIN_S = 0.3  # the supervisor's own grace and work are waited for this much longer, then it counts as lost
MAX_REQUEST = 16 << 20  # bytes of JSON


class BoxLost(Exception):
    """The sandbox is gone or was given up: why."""


class Box:
    """`first`: the process id on the host of its first process, with which all of it ends (None: not isolated)."""

    def __init__(self, process: subprocess.Popen[bytes], limits: Limits, scratch: str | None) -> None:
        self.process, self.limits, self.scratch = process, limits, scratch
        self.first: int | None = None
        self.first_handle: int | None = None  # a descriptor of it: an id could be another's by now
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    @classmethod
    async def start(cls, protection: Protection, limits: Limits) -> Box:
        """A sandbox that waits for its first request. BoxLost: it did not start, and what it said."""
        ours, theirs = socket.socketpair()
        info, info_written = os.pipe()
        scratch = None if protection.isolated else tempfile.mkdtemp(prefix="winnow_unprotected_")
        try:
            process = subprocess.Popen(
                protection.command(limits, info_written),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment(scratch or "/tmp"),
                pass_fds=[info_written],
                start_new_session=True,
                cwd=scratch or "/",
            )
        except OSError as error:
            ours.close()
            os.close(info)
            raise BoxLost(str(error)) from None
        finally:
            theirs.close()
            os.close(info_written)
        box = cls(process, limits, scratch)
        try:
            box.reader, box.writer = await asyncio.open_unix_connection(sock=ours, limit=1 << 16)
            await box._greet(protection, info)
        except BaseException as error:
            said = await box._last_words()
            await box.close()
            if isinstance(error, BoxLost | TimeoutError | OSError | ValueError):
                raise BoxLost(said or f"it did not start: {error or type(error).__name__}") from None
            raise
        finally:
            os.close(info)
        return box

    async def _greet(self, protection: Protection, info: int) -> None:
        async with asyncio.timeout(START_TIMEOUT_S):
            self.writer.write(frames.pack(protection.config(self.limits, MAX_REQUEST)))
            answer = await self._read_frame()
            if answer != {"ready": True}:
                raise BoxLost("it did not say that it is ready")
        if protection.isolated:  # written before the supervisor started
            self.first = int(json.loads(os.read(info, 4096))["child-pid"])
            self.first_handle = os.pidfd_open(self.first)
        assert self.process.stderr is not None
        self.process.stderr.close()

    async def _last_words(self) -> str:
        """The end of what a sandbox that did not start wrote to stderr."""
        stream = self.process.stderr
        if stream is None or stream.closed:
            return ""
        os.set_blocking(stream.fileno(), False)
        for _ in range(20):
            if self.process.poll() is not None:
                break
            await asyncio.sleep(0.01)
        with contextlib.suppress(BlockingIOError):
            lines = os.read(stream.fileno(), 1 << 16).decode(errors="replace").strip().splitlines()
            return lines[-1][:500] if lines else ""
        return ""

    async def _read_frame(self) -> dict[str, Any]:
        limit = 8 * self.limits.output_bytes + (1 << 16)  # JSON may take six bytes for one
        try:
            header = await self.reader.readexactly(frames.HEADER.size)
            return frames.unpack(await self.reader.readexactly(frames.body_length(header, limit)))
        except frames.FrameError as error:
            raise BoxLost(f"it broke the protocol: {error}") from None
        except (asyncio.IncompleteReadError, OSError):
            raise BoxLost("it has ended") from None

    async def ask(self, request: dict[str, Any], patience_s: float) -> Execution:
        """The answer to a cell or program. BoxLost: none in `patience_s`, or none that can be read; it is dead then."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(patience_s):
                self.writer.write(frames.pack(request))
                await self.writer.drain()
                answer = await self._read_frame()
            return _execution(answer, time.monotonic() - started)
        except TimeoutError:
            self.kill()
            raise BoxLost("it did not answer") from None
        except (BoxLost, OSError) as error:
            self.kill()
            raise BoxLost(str(error)) from None
        except BaseException:  # cancelled in the middle: what comes next would answer another question
            self.kill()
            raise

    def kill(self) -> None:
        """Ends all of it, now; `close` waits until it is gone."""
        with contextlib.suppress(ProcessLookupError):
            if self.first_handle is not None:
                signal.pidfd_send_signal(self.first_handle, signal.SIGKILL)
            else:
                self.process.kill()

    async def close(self) -> None:
        """Kills it and waits until nothing is left. May be called more than once."""
        if self.scratch is not None and hasattr(self, "writer"):  # without a namespace, only its supervisor can end all
            self.writer.close()
            for _ in range(100):
                if self.process.poll() is not None:
                    break
                await asyncio.sleep(0.01)
        self.kill()
        for attempt in range(2000):
            if self.process.poll() is not None:
                break
            if attempt == 500:
                self.process.kill()
            await asyncio.sleep(0.001 if attempt < 100 else 0.005)
        if self.first_handle is not None:
            os.close(self.first_handle)
            self.first_handle = None
        if hasattr(self, "writer"):
            self.writer.close()
        if self.process.stderr is not None:
            self.process.stderr.close()
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)


def _execution(answer: dict[str, Any], seconds: float) -> Execution:
    """BoxLost: the answer has another shape."""
    match answer:
        case {"output": str(output), "error": None | str() as error, "killed": None | str() as killed}:
            return Execution(output, error, answer.get("timed_out") is True, killed, seconds)
    raise BoxLost("it broke the protocol: an answer of another shape")
