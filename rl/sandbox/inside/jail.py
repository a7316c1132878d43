"""Giving up power for good: user id, capabilities, new privileges, system calls. Whatever fails raises OSError, and
what was to run within does not start."""

from __future__ import annotations

import ctypes
import os
import resource
import signal

from . import seccomp

ID = 1000  # user and group within; on a host where the trainer is root, nobody's without
NOBODY = 65534

_PDEATHSIG, _DUMPABLE, _SUBREAPER, _NO_NEW_PRIVS, _SECCOMP, _CAPBSET_DROP = 1, 4, 36, 38, 22, 24
_FILTER = 2
CLONE_NEWUSER = 0x10000000

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def prctl(option: int, value: int = 0, pointer: ctypes.c_void_p | None = None) -> None:
    # variadic: each argument must travel as a long
    arguments = [ctypes.c_ulong(value), pointer or ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)]
    check(libc.prctl(option, *arguments), f"prctl {option}")


def die_with_parent() -> None:
    prctl(_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Makes this process the parent of every descendant whose own parent ends."""
    prctl(_SUBREAPER, 1)


def set_dumpable(value: bool) -> None:
    """Not dumpable: no process of the same user may look into this one (/proc/PID/mem, fd, environ) or trace it."""
    prctl(_DUMPABLE, int(value))


def unshare(flags: int) -> None:
    check(libc.unshare(flags), "unshare")


def write_ids(process: int | str, user: int, group: int) -> None:
    """Maps the process's ID to `user` and `group` outside its user namespace."""
    for name, outside in (("uid_map", user), ("gid_map", group)):
        with open(f"/proc/{process}/{name}", "w") as file:
            file.write(f"{ID} {outside} 1")


def _become_nobody() -> None:
    """From the host's root to nobody, in a user namespace of its own, where process counts are its own too.

    The map is written by a child that is still root outside, since this process is nothing there any more.
    """
    os.setgroups([])
    ready, done = os.pipe(), os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(ready[1])  # else it would wait for itself where this process fails
        try:
            if os.read(ready[0], 1):
                write_ids(os.getppid(), NOBODY, NOBODY)
                os.write(done[1], b"+")
        finally:
            os._exit(0)
    os.close(done[1])
    unshare(CLONE_NEWUSER)
    os.write(ready[1], b"+")
    written = os.read(done[0], 1)
    os.waitpid(helper, 0)
    for end in (*ready, done[0]):
        os.close(end)
    if not written:
        raise PermissionError("the map of user ids could not be written")
    for capability in range(64):
        if libc.prctl(_CAPBSET_DROP, ctypes.c_ulong(capability), *[ctypes.c_ulong(0)] * 3) < 0:
            break  # past the kernel's last
    os.setresgid(ID, ID, ID)
    os.setresuid(ID, ID, ID)


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    check(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def _filter_calls() -> None:
    code = seccomp.program(os.uname().machine)

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    held = Program(len(code) // 8, code)
    prctl(_SECCOMP, _FILTER, ctypes.cast(ctypes.byref(held), ctypes.c_void_p))


def enter() -> None:
    """Gives up everything, for this process and all that it will start."""
    if os.getuid() != ID:
        _become_nobody()
    _drop_capabilities()
    die_with_parent()  # after the change of user, which clears it
    set_dumpable(False)
    prctl(_NO_NEW_PRIVS, 1)
    _filter_calls()


def limit(memory_mib: int, file_mib: int, open_files: int, processes: int | None, cpu_s: float) -> None:
    """Resource limits of this process and its children. processes: None where the kernel counts a user's processes on
    the whole machine (before Linux 5.14), which would count the trainer's."""
    mib = 1 << 20
    limits = {
        resource.RLIMIT_DATA: memory_mib * mib,  # private writable memory: a filtered process has no other
        resource.RLIMIT_FSIZE: file_mib * mib,
        resource.RLIMIT_NOFILE: open_files,
        resource.RLIMIT_CPU: int(cpu_s) + 1,
        resource.RLIMIT_STACK: 8 * mib,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 1024,
    }
    if processes is not None:
        limits[resource.RLIMIT_NPROC] = processes + 1  # the supervisor is one of the same user
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))
