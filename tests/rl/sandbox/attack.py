"""How an attack is run and what must hold afterwards, whatever it tried."""

from __future__ import annotations

import asyncio
import os
import textwrap
import time
from pathlib import Path

from rl.sandbox import Execution, SandboxPool, Session
from rl.sandbox.inside.supervisor import GRACE_S

SLACK_S = 1.0  # past its limit, for a call that has to be killed


def namespace(pid: int | str, name: str = "pid") -> str:
    return os.readlink(f"/proc/{pid}/ns/{name}")


def members(pid_namespace: str) -> list[int]:
    """Host processes in that namespace."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and namespace(entry.name) == pid_namespace:
                found.append(int(entry.name))
        except OSError:  # it has ended, or has no namespace any more
            continue
    return found


def home_of(session: Session) -> str:
    """The process namespace that a session lives in."""
    assert session._box is not None and session._box.first is not None
    return namespace(session._box.first)


def mounts() -> list[str]:
    return sorted(Path("/proc/self/mountinfo").read_text().splitlines())


async def attack_in(session: Session, code: str, timeout_s: float) -> Execution:
    """Runs the code; the session must answer in time, and the next call must work."""
    started = time.monotonic()
    done = await session.run(textwrap.dedent(code), timeout_s)
    seconds = time.monotonic() - started
    assert seconds < timeout_s + SLACK_S, f"{seconds:.2f} s, the limit was {timeout_s} s: {done}"
    after = await session.run("print(40 + 2)", 5.0)
    assert after.output.endswith("42\n") and after.error is None, f"{str(after)[-400:]} after {str(done)[-400:]}"
    return done


def attack(pool: SandboxPool, code: str, timeout_s: float = 2.0) -> Execution:
    """One attack in a session of its own, after which nothing may be left."""

    async def go() -> tuple[Execution, list[str]]:
        session = await pool.session()
        homes = [home_of(session)]
        try:
            done = await attack_in(session, code, timeout_s)
            homes.append(home_of(session))
        finally:
            await session.close()
        return done, homes

    before = mounts()
    done, homes = asyncio.run(go())
    assert [members(home) for home in homes] == [[], []], "processes are left"
    assert mounts() == before, "mounts are left"
    assert GRACE_S < SLACK_S
    return done
