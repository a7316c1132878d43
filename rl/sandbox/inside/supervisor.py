"""The first process of a sandbox: starts the process in which foreign code runs, watches over all, answers the host.

It runs no foreign code, is deaf to signals from within (as every first process of a namespace), cannot be looked into,
and its connection to the host is in no other process. So what the host reads is what this file says; the host bounds
and checks it all the same. When it ends, the kernel ends every process of the sandbox.

Host to supervisor, a frame each: first the configuration, then {"do": "cell", "code", "timeout_s"} or
{"do": "program", "source", "stdin", "timeout_s"}; each is answered by one frame, see `Supervisor.answer`.
Between two answers everything is frozen (SIGSTOP to all): what a cell left running neither computes nor grows.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from typing import Any

from . import frames, jail, worker
from .watched import READ, Ended, Kept, Watched

WATCH_S = 0.02
GRACE_S = 0.5  # from the interrupt to the kill
MAX_CLAIM = 1 << 16  # bytes of a worker's message


class Supervisor(Watched):
    """One at a time: the interpreter of a session, or a program."""

    def __init__(self, host: socket.socket, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.host = host
        self.worker: int | None = None
        self.channel: socket.socket | None = None  # to the worker of a session
        self.output = -1
        self.asked = 0
        self.interrupted = False  # the cell in hand was past its time
        self.killed: str | None = None  # why, and not told yet

    # -- processes

    def start_session(self) -> None:
        ours, theirs = socket.socketpair()
        self.output, written = os.pipe()
        self.worker = self.fork(lambda: worker.serve(theirs, written, self.config["max_request"]))
        theirs.close()
        os.close(written)
        for end in (self.output, ours.fileno()):
            os.set_blocking(end, False)
        self.channel = ours

    def end_session(self) -> None:
        if not self.tree.kill():
            os._exit(1)  # somebody sits in the kernel: the namespace ends with this process
        self.worker = None
        if self.channel is not None:
            self.channel.close()
            os.close(self.output)
            self.channel = None

    # -- one cell

    def cell(self, code: str, timeout_s: float) -> dict[str, Any]:
        note = ""
        if self.killed is not None:
            note = f"[the session was restarted, its variables are lost: {self.killed}]\n"
            self.killed = None
        if self.spent:
            return self.answer(note, error="the session's CPU time is used up", killed="cpu")
        if self.worker is None:
            self.start_session()
        else:
            self.tree.signal(signal.SIGCONT)
        self.asked += 1
        kept = Kept(self.config["output_bytes"])
        self.streams = {self.output: kept}
        self.interrupted = False
        try:
            claim = self._converse(frames.pack({"id": self.asked, "code": code}), timeout_s)
            self.read(self.output, times=32)  # whatever the pipe held when the cell ended
            self.tree.signal(signal.SIGSTOP)
            if self.interrupted:  # what the cell has started goes, its variables stay
                assert self.worker is not None
                self.tree.kill_others(self.worker)
                self.read(self.output, times=32)
            error, killed = claim["error"], None
        except Ended as reason:
            self.read(self.output, times=32)
            self.end_session()
            self.killed = str(reason)
            error, killed = f"the session was ended: {reason}", self.killed.partition(": ")[0]
        if self.interrupted:
            error = f"TimeoutError: no end within {timeout_s:g} s"
        return self.answer(note + kept.text(), error, killed, self.interrupted)

    def _converse(self, request: bytes, timeout_s: float) -> dict[str, Any]:
        """Sends the request and waits for the worker's claim about it. Ended: why there will be none."""
        assert self.channel is not None and self.worker is not None
        received = bytearray()
        deadline, watch_at = time.monotonic() + timeout_s, 0.0
        poll = select.poll()
        poll.register(self.output, select.POLLIN)
        channel = self.channel.fileno()
        poll.register(channel, select.POLLIN | select.POLLOUT)
        while True:
            now = time.monotonic()
            if now >= deadline:
                if self.interrupted:
                    raise Ended("time")
                self.interrupted, deadline = True, now + GRACE_S
                os.kill(self.worker, signal.SIGINT)
            if now >= watch_at:
                status = self.tree.reap().get(self.worker)
                if status is not None:
                    raise Ended(f"exited: {_meaning(status)}")
                if watch_at:
                    self.watch()
                watch_at = time.monotonic() + WATCH_S
            for descriptor, events in poll.poll(1000 * max(0.0, min(deadline, watch_at) - now)):
                if descriptor == self.output:
                    if not self.read(descriptor):
                        poll.unregister(descriptor)
                    continue
                if events & select.POLLOUT and request:
                    try:
                        request = request[self.channel.send(request) :]
                    except OSError:
                        request = b""
                    if not request:
                        poll.modify(channel, select.POLLIN)
                if events & (select.POLLIN | select.POLLHUP | select.POLLERR):
                    claim = self._claim(received)
                    if claim is not None:
                        return claim

    def _claim(self, received: bytearray) -> dict[str, Any] | None:
        """The worker's message, once it is whole. Ended: it is not what the protocol has."""
        assert self.channel is not None
        try:
            data = self.channel.recv(READ)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:
            raise Ended(self._why_gone())
        received += data
        try:
            claim = frames.take(received, MAX_CLAIM)
        except frames.FrameError as error:
            raise Ended(f"protocol: {error}") from None
        if claim is None:
            return None
        if claim.get("id") != self.asked or not isinstance(claim.get("error"), str | None) or received:
            raise Ended("protocol: a message of the wrong shape")
        return claim

    def _why_gone(self) -> str:
        """Of a closed channel: the worker has ended or is about to, or the code has closed it."""
        assert self.worker is not None
        until = time.monotonic() + 0.2
        while time.monotonic() < until:
            status = self.tree.reap().get(self.worker)
            if status is not None:
                return f"exited: {_meaning(status)}"
            time.sleep(0.002)
        return "protocol: the connection was closed"

    # -- one program

    def program(self, source: str, stdin: str, timeout_s: float) -> dict[str, Any]:
        """A program in a process of its own; its output is stdout alone."""
        self.end_session()
        name = f".stdin-{os.urandom(8).hex()}"
        given = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        os.unlink(name)
        data = stdin.encode(errors="replace")
        while data:
            data = data[os.write(given, data) :]
        os.lseek(given, 0, os.SEEK_SET)
        out, out_written = os.pipe()
        err, err_written = os.pipe()
        pid = self.fork(lambda: worker.run_program(source, given, out_written, err_written))
        for end in (given, out_written, err_written):
            os.close(end)
        for end in (out, err):
            os.set_blocking(end, False)
        self.streams = {out: Kept(self.config["output_bytes"]), err: Kept(2000)}
        reason, status = None, None
        try:
            status = self._wait(pid, timeout_s)
        except Ended as ended:
            reason = str(ended)
        for end in (out, err):
            self.read(end, times=32)
        self.end_session()
        last = self.streams[err].text().strip().rpartition("\n")[2][: worker.MAX_ERROR]
        if reason is not None:
            what = f"TimeoutError: no end within {timeout_s:g} s" if reason == "time" else f"ended: {reason}"
            error: str | None = what
        elif status:
            error = last if status == 1 and last else _meaning(status)
        else:
            error = None
        os.close(out)
        os.close(err)
        return self.answer(self.streams[out].text(), error=error, killed=reason, timed_out=reason == "time")

    def _wait(self, pid: int, timeout_s: float) -> int:
        """The exit code of `pid`."""
        deadline, watch_at = time.monotonic() + timeout_s, 0.0
        poll = select.poll()
        for descriptor in self.streams:
            poll.register(descriptor, select.POLLIN)
        ended = os.pidfd_open(pid)
        poll.register(ended, select.POLLIN)
        try:
            while True:
                now = time.monotonic()
                if now >= deadline:
                    raise Ended("time")
                if now >= watch_at:
                    self.watch()
                    watch_at = time.monotonic() + WATCH_S
                for descriptor, _ in poll.poll(1000 * max(0.0, min(deadline, watch_at) - now)):
                    if descriptor != ended and not self.read(descriptor):
                        poll.unregister(descriptor)
                status = self.tree.reap().get(pid)
                if status is not None:
                    return status
        finally:
            os.close(ended)

    # -- the host

    @staticmethod
    def answer(
        output: str, error: str | None = None, killed: str | None = None, timed_out: bool = False
    ) -> dict[str, Any]:
        return {"output": output, "error": error, "killed": killed, "timed_out": timed_out}

    def serve(self) -> None:
        self.start_session()
        while True:
            request = receive(self.host, self.config["max_request"])
            if request is None:
                self.tree.kill()
                return
            if request["do"] == "cell":
                answer = self.cell(request["code"], request["timeout_s"])
            else:
                answer = self.program(request["source"], request["stdin"], request["timeout_s"])
            self.host.sendall(frames.pack(answer))


def _meaning(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def receive(host: socket.socket, limit: int) -> dict[str, Any] | None:
    """The host's next message; None where the host is gone."""
    received = bytearray()
    while (message := frames.take(received, limit)) is None:
        data = host.recv(READ)
        if not data:
            return None
        received += data
    return message


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from within, a first process hears only what it handles
    host = socket.socket(fileno=os.dup(0))
    config = receive(host, 1 << 20)
    if config is None:
        return
    if config["isolated"]:
        jail.enter()
    else:
        jail.die_with_parent()
        jail.adopt_orphans()
    quiet = os.open("/dev/null", os.O_RDWR)
    supervisor = Supervisor(host, config)
    sys.path[:] = [path for path in sys.path if path != config["own_path"]] + config["paths"]
    for standard in (0, 1):
        os.dup2(quiet, standard)
    host.sendall(frames.pack({"ready": True}))
    os.dup2(quiet, 2)  # until here, what fails is told there
    supervisor.serve()
    os._exit(0)
