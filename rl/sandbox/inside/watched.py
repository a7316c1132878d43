"""What the supervisor does alike for cells and programs: starts a process for foreign code, reads it, holds it to the
limits on everything together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from . import jail
from .tree import Tree

MAX_SOCKETS = 256  # a unix socket may hold 0.2 MiB of the kernel's memory
READ = 1 << 16


class Kept:
    """Head and tail of a stream, in at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.total = limit, 0
        self.head, self.tail = bytearray(), bytearray()

    def add(self, data: bytes) -> None:
        self.total += len(data)
        room = self.limit // 2 - len(self.head)
        if room > 0:
            self.head += data[:room]
            data = data[room:]
        self.tail += data
        if len(self.tail) > 4 * self.limit + READ:
            self._trim()

    def _trim(self) -> None:
        del self.tail[: max(0, len(self.tail) - (self.limit - self.limit // 2))]

    def text(self) -> str:
        self._trim()
        left_out = self.total - len(self.head) - len(self.tail)
        note = f"\n[... {left_out} bytes left out ...]\n".encode() if left_out else b""
        return (self.head + note + self.tail).decode(errors="replace")


class Ended(Exception):
    """Why everything had to be killed."""


class Watched:
    """`config`: what `Protection.config` makes: the fields of Limits and how the sandbox is isolated."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.tree = Tree(config["isolated"])
        self.streams: dict[int, Kept] = {}  # what is read, by descriptor
        self.spent = False  # the session's CPU time is used up

    def fork(self, run: Callable[[], None]) -> int:
        """A process with all limits that calls `run`, and leaves with what that raised or with 0."""
        pid = os.fork()
        if pid:
            return pid
        try:
            config = self.config
            os.setsid()
            jail.die_with_parent()
            jail.set_dumpable(True)  # the supervisor must see how much memory is whose
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write("1000")
            os.nice(10)
            processes = config["processes"] if config["count_processes"] else None
            jail.limit(config["memory_mib"], config["file_mib"], config["open_files"], processes, config["cpu_s"])
            run()
        except SystemExit:
            raise
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode(errors="replace"))
            os._exit(70)
        raise SystemExit(0)

    def watch(self) -> None:
        """Raises Ended where a limit on everything together is passed."""
        config = self.config
        limit = config["memory_mib"] << 20
        usage = self.tree.usage(precise_above=limit // 2)
        if usage.memory_bytes > limit:
            raise Ended("memory")
        if usage.tasks > config["processes"]:
            raise Ended("processes")
        if usage.cpu_s > config["cpu_s"]:
            self.spent = True
            raise Ended("cpu")
        if config["isolated"]:
            disk = os.statvfs("/tmp")
            if disk.f_files - disk.f_ffree > config["tmp_inodes"]:
                raise Ended("files")
            with open("/proc/net/sockstat") as file:
                if int(file.readline().split()[2]) > MAX_SOCKETS:
                    raise Ended("sockets")

    def read(self, descriptor: int, times: int = 1) -> bool:
        """Takes what is there into the kept text; False at the end of the stream."""
        for _ in range(times):
            try:
                data = os.read(descriptor, READ)
            except BlockingIOError:
                return True
            if not data:
                return False
            self.streams[descriptor].add(data)
        return True
