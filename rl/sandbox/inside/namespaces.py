"""A sandbox without bubblewrap: namespaces and a root file system of its own, then the interpreter in it.

Run on the host as its own process, with the specification (see `rl/sandbox/protection.py`) as its one argument. As an
ordinary user everything happens in a user namespace; as root, the namespaces stay the host's and the supervisor becomes
nobody once it runs, so that it owns none of them.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any

from . import jail

_NEW = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000  # mnt cgroup uts ipc pid net
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _NOATIME, _NODIRATIME = 1, 2, 4, 8, 32, 1024, 2048
_BIND, _REC, _SLAVE, _RELATIME = 4096, 16384, 1 << 19, 1 << 21
_KEPT = {
    "nosuid": _NOSUID,
    "nodev": _NODEV,
    "noexec": _NOEXEC,
    "noatime": _NOATIME,
    "nodiratime": _NODIRATIME,
    "relatime": _RELATIME,
}  # a mount that came from elsewhere may not lose these
_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
BASE = "/tmp"  # where the new root is put together, in a mount namespace of its own: nothing of it shows outside
COVERED = ("sys", "sysrq-trigger", "irq", "bus", "acpi", "scsi")  # of /proc: read-only or gone


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    result = jail.libc.mount(*encoded, ctypes.c_ulong(flags), None if data is None else data.encode())
    jail.check(result, f"mount {target}")


def _mounts_below(path: str) -> list[tuple[str, int]]:
    """Mount points at or below `path`, with the flags that each must keep."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.split()
            point = fields[4].encode("utf-8", "surrogateescape").decode("unicode_escape")
            if point == path or point.startswith(path + "/"):
                found.append((point, sum(_KEPT.get(word, 0) for word in fields[5].split(","))))
    return found


def _bind(descriptor: int, target: str, flags: int) -> None:
    """Mounts what `descriptor` is open at, with all that is mounted below it."""
    mount(f"/proc/self/fd/{descriptor}", target, None, _BIND | _REC)
    for point, kept in _mounts_below(target):
        mount("none", point, None, _BIND | _REMOUNT | _NOSUID | flags | kept)


def _place(root: str, inner: str, folder: bool) -> str:
    """An empty folder or file to mount on."""
    target = root + inner
    os.makedirs(target if folder else os.path.dirname(target), exist_ok=True)
    if not folder:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    return target


def build(spec: dict[str, Any]) -> None:
    """The new root, complete but for /proc, at BASE; the working directory is there."""
    sources = [(os.open(source, os.O_PATH), inner) for source, inner in spec["binds"]]  # BASE hides what lies below it
    devices = [(os.open(path, os.O_PATH), path) for path in spec["devices"]]
    mount("none", "/", None, _REC | _SLAVE)
    mount("tmpfs", BASE, "tmpfs", _NOSUID | _NODEV, "size=1m,nr_inodes=1k,mode=755")
    for descriptor, inner in sources:
        folder = os.path.isdir(f"/proc/self/fd/{descriptor}")
        _bind(descriptor, _place(BASE, inner, folder), _RDONLY | _NODEV)
    for descriptor, path in devices:
        _bind(descriptor, _place(BASE, path, False), 0)
    for target, inner in spec["links"]:
        os.makedirs(os.path.dirname(BASE + inner), exist_ok=True)
        os.symlink(target, BASE + inner)
    data = f"size={spec['tmp_bytes']},nr_inodes={spec['tmp_inodes']},mode=1777"
    mount("tmpfs", _place(BASE, "/tmp", True), "tmpfs", _NOSUID | _NODEV, data)
    _place(BASE, "/proc", True)
    os.chdir(BASE)
    for descriptor, _ in sources + devices:
        os.close(descriptor)


def enter() -> None:
    """From the first process of the new process namespace: /proc, then the old root is gone."""
    mount("proc", BASE + "/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    for name in COVERED:
        point = f"{BASE}/proc/{name}"
        if os.path.exists(point):
            mount(point, point, None, _BIND | _REC)
            mount("none", point, None, _BIND | _REMOUNT | _RDONLY | _NOSUID | _NODEV | _NOEXEC)
    mount("none", BASE, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    number = _PIVOT_ROOT[os.uname().machine]
    jail.check(jail.libc.syscall(ctypes.c_long(number), b".", b"."), "pivot_root")
    jail.check(jail.libc.umount2(b".", _DETACH), "umount of the old root")
    os.chdir("/tmp")


def main() -> None:
    spec = json.loads(sys.argv[1])
    jail.die_with_parent()
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        jail.unshare(_NEW)
    else:
        jail.unshare(_NEW | jail.CLONE_NEWUSER)
        with open("/proc/self/setgroups", "w") as file:
            file.write("deny")
        jail.write_ids("self", user, group)
    build(spec)
    child = os.fork()
    if child == 0:
        os.close(spec["info_fd"])
        jail.die_with_parent()
        enter()
        os.execve(spec["command"][0], spec["command"], dict(os.environ))
    with os.fdopen(spec["info_fd"], "w") as info:
        json.dump({"child-pid": child}, info)
    quiet = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):  # the sandbox's end alone keeps its connections open
        os.dup2(quiet, standard)
    os.waitpid(child, 0)
