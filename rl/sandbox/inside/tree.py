"""The processes of a sandbox as its supervisor sees them: who there is, what they use, and signals to all at once."""

from __future__ import annotations

import os
import resource
import signal
import time
from dataclasses import dataclass

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Usage:
    """All processes together, the supervisor left out; CPU time includes that of those which have ended."""

    memory_bytes: int
    tasks: int
    cpu_s: float


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on (`state` first); [] where the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return []
    return text[text.rfind(b")") + 2 :].decode().split()  # the name before may hold anything


class Tree:
    """Everyone but this process: where `isolated`, all of its process namespace, else its descendants."""

    def __init__(self, isolated: bool) -> None:
        assert not isolated or os.getpid() == 1, "signals to all would reach the host"
        self.isolated = isolated

    def others(self) -> list[int]:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        if self.isolated:
            return [pid for pid in pids if pid != 1]
        parents = {pid: int(fields[1]) for pid in pids if (fields := _stat(pid))}
        found = {os.getpid()}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return sorted(found - {os.getpid()})

    def signal(self, number: signal.Signals) -> None:
        """To everyone. In a process namespace that is one step, which no process escapes by forking."""
        if self.isolated:
            targets = [-1]
        else:
            targets = self.others()
        for pid in targets:
            try:
                os.kill(pid, number)
            except (ProcessLookupError, PermissionError):  # nobody is there, or only what is not ours to end
                continue

    def kill(self, timeout_s: float = 2.0) -> bool:
        """Ends everyone; False where somebody is still there after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.signal(signal.SIGKILL)
            self.reap()
            if not self.others():
                return True
            time.sleep(0.001)
        return False

    def kill_others(self, keep: int, timeout_s: float = 0.2) -> None:
        """Ends everyone but `keep`; everyone must be stopped, so that no new ones come. Zombies are `keep`'s to wait
        for."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.reap()
            living = [pid for pid in self.others() if pid != keep and _stat(pid)[:1] not in ([], ["Z"], ["X"])]
            if not living:
                return
            for pid in living:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.001)

    def reap(self) -> dict[int, int]:
        """Exit codes of children that have ended, orphans among them; negative: the signal."""
        ended: dict[int, int] = {}
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return ended
            if pid == 0:
                return ended
            ended[pid] = os.waitstatus_to_exitcode(status)

    def usage(self, precise_above: int) -> Usage:
        """What everyone uses. Pages that processes share are counted once, by a reading which is dear and therefore
        taken only where the sum of resident sizes is above `precise_above` bytes."""
        pids, tasks, memory, ticks = [], 0, 0, 0
        for pid in self.others():
            fields = _stat(pid)
            if fields:
                pids.append(pid)
                ticks += sum(int(field) for field in fields[11:15])
                tasks += int(fields[17])
                memory += int(fields[21]) * _PAGE
        if memory > precise_above:
            memory = sum(_share(pid) for pid in pids)
        reaped = resource.getrusage(resource.RUSAGE_CHILDREN)
        return Usage(memory, tasks, ticks / _TICKS + reaped.ru_utime + reaped.ru_stime)


def _share(pid: int) -> int:
    """The process's proportional share of the memory that it uses, in bytes; all of it where it hides its share."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            lines = file.read().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith((b"Pss:", b"SwapPss:")))
    except OSError:
        fields = _stat(pid)
        return int(fields[21]) * _PAGE if fields else 0
