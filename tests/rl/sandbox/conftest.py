"""Every test that takes `mode` or `pool` runs under each way to isolate that this machine has."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from rl.sandbox import Limits, SandboxPool

SECRET = "hunter2-winnow-planted"
LIMITS = Limits(timeout_s=2.0, memory_mib=160, processes=24, tmp_mib=16, output_bytes=4000, file_mib=8, cpu_s=60.0)


def _refused(mode: str) -> str | None:
    """Why the machine cannot have it, found without the code under test."""
    if mode == "bubblewrap":
        return None if shutil.which("bwrap") else "no bwrap on PATH"
    if shutil.which("unshare") is None:
        return "no unshare on PATH to ask with"
    user = [] if os.geteuid() == 0 else ["-r"]
    asked = subprocess.run(["unshare", *user, "-mnpiuf", "--mount-proc", "true"], capture_output=True, text=True)
    return asked.stderr.strip() or f"unshare ended with {asked.returncode}" if asked.returncode else None


@pytest.fixture(scope="session", params=["bubblewrap", "namespaces"])
def mode(request: pytest.FixtureRequest) -> str:
    reason = _refused(request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(scope="session")
def pool(mode: str) -> Iterator[SandboxPool]:
    os.environ["WINNOW_PLANTED_SECRET"] = SECRET
    with SandboxPool(LIMITS, mode, warm=2, sessions=8, wait_s=20.0) as opened:
        yield opened
    del os.environ["WINNOW_PLANTED_SECRET"]
