"""What a sandbox may use, and what running code in it gives back."""

from __future__ import annotations

from dataclasses import dataclass, fields

from conf.errors import UserError


@dataclass(frozen=True)
class Limits:
    """All of one sandbox, whatever processes it starts. A call: one `run`."""

    timeout_s: float = 120.0  # a call, where it names no time of its own
    memory_mib: int = 512  # private memory: of each process by the kernel, of all together by the supervisor
    processes: int = 32  # threads count
    tmp_mib: int = 64  # of /tmp, which is the one place to write to and lies in memory
    output_bytes: int = 20_000  # a call: the first and the last half are kept
    file_mib: int = 32  # a file
    open_files: int = 128  # a process
    cpu_s: float = 600.0  # a session

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < float("inf"):
                raise UserError(f"the sandbox's limit {field.name}={value} must be above 0 and finite")


@dataclass(frozen=True)
class Execution:
    """What a call came to.

    output: stdout and stderr as they were written, the last expression's repr, a short traceback (of a program: stdout
    alone). error: None or one line, "TypeName: message" where the code raised. timed_out: the call was past its time;
    where `killed` is None it obeyed the interrupt and the session keeps its state. killed: why the session's state is
    lost: "time", "memory", "processes", "cpu", "files", "sockets", "exited", "protocol" or "lost" (the sandbox itself).
    """

    output: str
    error: str | None = None
    timed_out: bool = False
    killed: str | None = None
    seconds: float = 0.0
