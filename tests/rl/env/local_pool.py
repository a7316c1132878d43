"""A sandbox that is none: programs of ours run in this process, so that hundreds of problems are checked in a second.
The real one has its own tests, and test_programs.py plays a few problems in it."""

from __future__ import annotations

import builtins
import contextlib
import importlib
import importlib.util
import io
import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Execution:
    output: str
    error: str | None = None
    timed_out: bool = False
    killed: str | None = None
    seconds: float = 0.0


class LocalSession:
    async def run(self, code: str, timeout_s: float | None = None) -> Execution:
        return run_here(code, "")

    async def close(self) -> None:
        return None


class LocalPool:
    def __init__(self, limits: Any = None, mode: str = "auto", warm: int = 0) -> None:
        self.mode = mode

    async def session(self) -> LocalSession:
        return LocalSession()

    async def __aenter__(self) -> LocalPool:
        return self

    async def __aexit__(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class Limits:
    timeout_s: float = 120.0


async def run_program(pool: LocalPool, source: str, stdin: str, timeout_s: float) -> Execution:
    return run_here(source, stdin)


def run_here(source: str, stdin: str) -> Execution:
    output, kept = io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(output):
            builtins.exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
    except (Exception, SystemExit) as failure:
        return Execution(output.getvalue(), f"{type(failure).__name__}: {failure}")
    finally:
        sys.stdin = kept
    return Execution(output.getvalue())


HAS_SANDBOX = importlib.util.find_spec("rl.sandbox") is not None


def install(monkeypatch: pytest.MonkeyPatch, run: Any = run_program) -> None:
    """`rl.sandbox` runs programs by `run`, and its pools are local ones."""
    if not HAS_SANDBOX:
        monkeypatch.setitem(sys.modules, "rl.sandbox", types.ModuleType("rl.sandbox"))
    sandbox = importlib.import_module("rl.sandbox")
    for name, member in (("SandboxPool", LocalPool), ("Limits", Limits), ("run_program", run)):
        monkeypatch.setattr(sandbox, name, member, raising=False)
