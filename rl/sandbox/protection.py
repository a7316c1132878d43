"""How foreign code is kept apart on this machine: `find_protection` tries, and refuses rather than doing with less.

A sandbox sees the interpreter's library, the system's shared libraries and the installed packages, all read-only, three
devices, its own /proc and an empty /tmp. It does not see the home, the project, the runs or /etc.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import site
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import UserError, nearest
from rl.sandbox.inside import seccomp
from rl.sandbox.limits import Limits

UNPROTECTED = "unprotected_model_code_runs_as_me"
MODES = ("auto", "bubblewrap", "namespaces", UNPROTECTED)
INSIDE = Path(__file__).resolve().parent / "inside"
OWN_PATH = "/sandbox"
SYSTEM_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/alternatives", "/usr/share/zoneinfo")  # where libraries and zones are found
DEVICES = ("/dev/null", "/dev/random", "/dev/urandom")
TMP_INODES = 16384  # of /tmp: an empty file takes a KiB of the kernel's memory
SYSCTLS = {
    "kernel/unprivileged_userns_clone": ("0", "kernel.unprivileged_userns_clone=1"),
    "kernel/apparmor_restrict_unprivileged_userns": ("1", "kernel.apparmor_restrict_unprivileged_userns=0"),
    "user/max_user_namespaces": ("0", "user.max_user_namespaces=10000"),
}


@dataclass(frozen=True)
class View:
    """What is mounted: (path on the host, path within), (target, link) and the packages' folders within."""

    binds: tuple[tuple[str, str], ...]
    links: tuple[tuple[str, str], ...]
    packages: tuple[str, ...]
    python: str


def _refuse_private(source: str) -> None:
    for private, name in ((os.path.expanduser("~"), "home"), (os.getcwd(), "working directory")):
        inner = os.path.realpath(private)
        if inner != "/" and (inner == source or inner.startswith(source + "/")):
            raise UserError(
                f"a sandbox would show your {name} {inner}, which lies in {source} where Python's libraries are:"
                " start from another folder or install Python elsewhere"
            )


def view() -> View:
    """For this interpreter. UserError: it would show a private folder."""
    python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    prefix = os.path.realpath(sys.base_prefix)
    links = [(os.readlink(path), path) for path in SYSTEM_LIBRARIES if os.path.islink(path)]
    shown = [path for path in SYSTEM_LIBRARIES if os.path.isdir(path) and not os.path.islink(path)]
    shown += [
        path for name in ("lib", "lib64") if os.path.isdir(path := f"{prefix}/{name}") and not os.path.islink(path)
    ]
    binds: list[tuple[str, str]] = []
    for path in dict.fromkeys([*shown, *filter(os.path.exists, SYSTEM_FILES), python]):
        if not any(path.startswith(f"{inner}/") for _, inner in binds):
            _refuse_private(path)
            binds.append((path, path))
    packages = []
    for folder in dict.fromkeys(os.path.realpath(path) for path in site.getsitepackages() if os.path.isdir(path)):
        if any(folder.startswith(f"{inner}/") for _, inner in binds):
            packages.append(folder)
        else:
            _refuse_private(folder)
            packages.append(f"/packages/{len(packages)}")
            binds.append((folder, packages[-1]))
    binds.append((str(INSIDE), f"{OWN_PATH}/inside"))
    return View(tuple(binds), (*links, ("/tmp", "/dev/shm")), tuple(packages), python)


def environment(tmp: str = "/tmp") -> dict[str, str]:
    """All that a sandbox has of it. Hashes are fixed, so that the same code prints the same."""
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {
        **{"HOME": tmp, "TMPDIR": tmp, "USER": "sandbox", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"},
        **{"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"},
        **dict.fromkeys(threads, "1"),
    }


def _interpreter(python: str, module: str, path: str) -> list[str]:
    """Without user folders, `site`, bytecode files or the current folder on the path."""
    code = f"import sys; sys.path.insert(0, {path!r}); from inside.{module} import main; main()"
    return [python, "-s", "-P", "-S", "-B", "-c", code]


@dataclass(frozen=True)
class Protection:
    """A way that was tried on this machine. `name`: one of MODES but auto."""

    name: str
    view: View

    @property
    def isolated(self) -> bool:
        return self.name != UNPROTECTED

    def command(self, limits: Limits, info_fd: int) -> list[str]:
        """What starts a supervisor; {"child-pid": N} is written to `info_fd` where it is in a namespace."""
        if self.name == "bubblewrap":
            return self._bubblewrap(limits, info_fd)
        if self.name == "namespaces":
            spec = {
                "binds": self.view.binds,
                "links": self.view.links,
                "devices": DEVICES,
                "tmp_bytes": limits.tmp_mib << 20,
                "tmp_inodes": TMP_INODES,
                "info_fd": info_fd,
                "command": _interpreter(self.view.python, "supervisor", OWN_PATH),
            }
            return [*_interpreter(self.view.python, "namespaces", str(INSIDE.parent)), json.dumps(spec)]
        return _interpreter(self.view.python, "supervisor", str(INSIDE.parent))

    def _bubblewrap(self, limits: Limits, info_fd: int) -> list[str]:
        spaces = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        power = ["--cap-drop", "ALL"]
        if (
            os.geteuid() == 0
        ):  # the supervisor becomes nobody in a user namespace of its own, and needs these until then
            for name in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_SYS_ADMIN"):
                power += ["--cap-add", name]
        else:
            spaces += ["--unshare-user", "--uid", "1000", "--gid", "1000"]
        inner_paths = [*(inner for _, inner in self.view.binds), *DEVICES, *(link for _, link in self.view.links)]
        above = {str(folder) for path in inner_paths for folder in Path(path).parents} - {"/"}
        mounts = [word for path in sorted(above) for word in ("--perms", "0755", "--dir", path)]  # else 0700, of root
        mounts += [word for bind in self.view.binds for word in ("--ro-bind", *bind)]
        mounts += [word for path in DEVICES for word in ("--dev-bind", path, path)]
        mounts += [word for link in self.view.links for word in ("--symlink", *link)]
        mounts += ["--proc", "/proc", "--perms", "1777", "--size", str(limits.tmp_mib << 20), "--tmpfs", "/tmp"]
        life = ["--as-pid-1", "--die-with-parent", "--new-session", "--info-fd", str(info_fd)]
        command = _interpreter(self.view.python, "supervisor", OWN_PATH)
        return [
            shutil.which("bwrap") or "bwrap",
            *spaces,
            *power,
            *life,
            *mounts,
            "--remount-ro",
            "/",
            "--chdir",
            "/tmp",
            "--",
            *command,
        ]

    def config(self, limits: Limits, max_request: int) -> dict[str, Any]:
        """The supervisor's first message."""
        release = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
        return {
            **vars(limits),
            "isolated": self.isolated,
            "count_processes": self.isolated and release >= (5, 14),
            "tmp_inodes": TMP_INODES,
            "max_request": max_request,
            "own_path": OWN_PATH if self.isolated else str(INSIDE.parent),
            "paths": list(self.view.packages) if self.isolated else site.getsitepackages(),
        }


def _hint() -> str:
    """What stands in the way, as far as the machine says so."""
    for name, (bad, fix) in SYSCTLS.items():
        path = Path("/proc/sys") / name
        if path.exists() and path.read_text().strip() == bad:
            return f"sysctl -w {fix} would allow it"
    return "in a container, that needs one started with user namespaces allowed (seccomp and /proc unmasked)"


def find_protection(mode: str = "auto") -> Protection:
    """The way to isolate that `mode` names, after it was tried: a sandbox was started and looked at from outside.

    auto: bubblewrap, else namespaces; never less. UserError: no such mode, or why it does not work here.
    """
    from rl.sandbox.probe import probe  # which needs this module

    if mode not in MODES:
        raise UserError(f"rl.tools.sandbox={mode} is not known: {nearest(mode, MODES)}")
    if platform.system() != "Linux":
        raise UserError(f"rl.tools.sandbox={mode}: model-written code runs on Linux only, this is {platform.system()}")
    if mode == UNPROTECTED:
        return Protection(mode, view())
    if platform.machine() not in seccomp.MACHINES:
        known = " and ".join(seccomp.MACHINES)
        raise UserError(f"rl.tools.sandbox={mode}: the system-call filter knows {known}, not {platform.machine()}")
    reasons = []
    for name in ("bubblewrap", "namespaces") if mode == "auto" else (mode,):
        if name == "bubblewrap" and shutil.which("bwrap") is None:
            reasons.append("bubblewrap: no bwrap on PATH (apt or dnf install bubblewrap)")
            continue
        protection = Protection(name, view())
        failure = probe(protection)
        if failure is None:
            return protection
        reasons.append(f"{name}: {failure}")
    reason = "; ".join(reasons).replace("\n", " ")
    raise UserError(
        f"rl.tools.sandbox={mode}: model-written code cannot be isolated here ({reason}); {_hint()};"
        f" rl.tools.sandbox={UNPROTECTED} runs it without protection"
    )
