"""The pool: warm, bounded, usable from any event loop, and gone with the trainer however that ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rl.sandbox import Limits, SandboxBusy, SandboxPool, Session, run_program
from rl.sandbox.box import Box, BoxLost
from tests.rl.sandbox.attack import home_of, members

ROOT = Path(__file__).resolve().parents[3]
LIMITS = Limits(timeout_s=2.0, memory_mib=128, tmp_mib=8)


async def one(pool: SandboxPool, code: str) -> str:
    session = await pool.session()
    try:
        return (await session.run(code)).output
    finally:
        await session.close()


def test_one_pool_serves_successive_loops_and_threads(mode: str) -> None:
    with SandboxPool(LIMITS, mode, warm=1) as pool:
        assert asyncio.run(one(pool, "1")) == "1\n"
        assert asyncio.run(one(pool, "2")) == "2\n"
        results: list[str] = []
        threads = [threading.Thread(target=lambda n=n: results.append(asyncio.run(one(pool, str(n))))) for n in (3, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == ["3\n", "4\n"]


def test_a_session_outlives_the_loop_that_opened_it(mode: str) -> None:
    with SandboxPool(LIMITS, mode, warm=1) as pool:
        session = asyncio.run(pool.session())
        asyncio.run(session.run("x = 1"))
        assert asyncio.run(session.run("x")).output == "1\n"
        asyncio.run(session.close())


def test_warm_sessions_are_there_at_once_and_refilled(mode: str) -> None:
    async def go() -> list[float]:
        async with SandboxPool(LIMITS, mode, warm=3) as pool:
            times = []
            for _ in range(2):
                until = time.monotonic() + 20
                while len(pool._ready) < 3 and time.monotonic() < until:
                    await asyncio.sleep(0.01)
                assert len(pool._ready) == 3
                started = time.monotonic()
                session = await pool.session()
                assert (await session.run("1")).output == "1\n"
                times.append(time.monotonic() - started)
                await session.close()
            return times

    assert min(asyncio.run(go())) < 0.05


def test_sessions_are_bounded_and_waiting_ends(mode: str) -> None:
    async def go() -> None:
        async with SandboxPool(LIMITS, mode, warm=0, sessions=2, wait_s=0.3) as pool:
            first, second = await pool.session(), await pool.session()
            with pytest.raises(SandboxBusy, match="all 2 sandbox sessions"):
                await pool.session()
            # a program needs no session's place
            assert (await run_program(pool, "print(1)", "", 3.0)).output == "1\n"
            waiting = asyncio.create_task(pool.session())
            await asyncio.sleep(0.05)
            await first.close()
            third = await waiting
            assert (await third.run("3")).output == "3\n"
            await asyncio.gather(second.close(), third.close())
            assert len(pool._live) == 0

    asyncio.run(go())


def test_a_place_is_given_back_where_no_sandbox_starts(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*_: object) -> Box:
        raise BoxLost("no memory")

    async def go() -> None:
        async with SandboxPool(LIMITS, mode, warm=0, sessions=1, wait_s=1.0) as pool:
            with monkeypatch.context() as patched:
                patched.setattr(Box, "start", fails)
                for _ in range(2):
                    with pytest.raises(RuntimeError, match="no sandbox starts any more: no memory"):
                        await pool.session()
            await (await pool.session()).close()

    asyncio.run(go())


def test_cancelled_calls_leave_nothing(mode: str) -> None:
    async def go() -> None:
        async with SandboxPool(LIMITS, mode, warm=0, sessions=1, wait_s=5.0) as pool:
            session = await pool.session()
            await session.run("x = 1")
            started = time.monotonic()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(session.run("import time\ntime.sleep(60)", 60.0), 0.2)
            assert time.monotonic() - started < 1.0
            # the interpreter went with the call that was cut off
            after = await session.run("x")
            assert "is lost" in after.output or "are lost" in after.output
            assert (after.error or "").startswith("NameError")
            await session.close()
            # a caller that gave up waiting for a session does not keep its place
            held = await pool.session()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(pool.session(), 0.1)
            await held.close()
            await asyncio.sleep(0.3)
            await (await pool.session()).close()

    asyncio.run(go())


def test_closing_the_pool_ends_what_runs(mode: str) -> None:
    pool = SandboxPool(LIMITS, mode, warm=2)

    async def go() -> tuple[str, object]:
        async with pool:
            session = await pool.session()
            call = asyncio.create_task(session.run("while True: pass", 60.0))
            await asyncio.sleep(0.2)
            home = home_of(session)
            await pool.close()
            return home, (await asyncio.gather(call, return_exceptions=True))[0]

    home, result = asyncio.run(go())
    assert members(home) == []
    assert getattr(result, "killed", None) == "lost" or isinstance(result, asyncio.CancelledError | RuntimeError), (
        result
    )
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(Session(pool, None).run("1"))  # type: ignore[arg-type]
    with pool:  # and it may open again
        assert asyncio.run(one(pool, "5")) == "5\n"


def test_a_sandbox_that_vanishes_costs_one_call(mode: str) -> None:
    async def go() -> None:
        async with SandboxPool(LIMITS, mode, warm=1) as pool:
            session = await pool.session()
            await session.run("x = 1")
            assert session._box is not None and session._box.first is not None
            os.kill(session._box.first, signal.SIGKILL)
            lost = await session.run("x")
            assert lost.killed == "lost" and lost.error
            after = await session.run("1 + 1")
            assert after.output.startswith("[the session was restarted") and after.output.endswith("2\n")
            # a warm one that died unused is not handed out
            while not pool._ready:
                await asyncio.sleep(0.01)
            os.kill(pool._ready[0].first or 0, signal.SIGKILL)
            await asyncio.sleep(0.2)
            assert await one(pool, "7") == "7\n"
            await session.close()

    asyncio.run(go())


TRAINER = """
import asyncio, os, sys, time
from rl.sandbox import Limits, SandboxPool
pool = SandboxPool(Limits(memory_mib=128), sys.argv[1], warm=2).open()
async def go():
    session = await pool.session()
    await session.run("import os, time\\nif os.fork() == 0:\\n  os.setsid()\\n  time.sleep(600)\\n  os._exit(0)")
    asyncio.get_running_loop().create_task(session.run("while True: pass", 600.0))
    await asyncio.sleep(0.2)
    boxes = [session._box, *pool._ready]
    if os.fork() == 0:  # holds copies of the trainer's descriptors, as a data loader's process does
        os.close(1)
        time.sleep(8)
        os._exit(0)
    print(*[os.readlink(f"/proc/{box.first}/ns/pid") for box in boxes], flush=True)
    await asyncio.sleep(600)
asyncio.run(go())
"""


def test_everything_dies_with_the_trainer(mode: str) -> None:
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", TRAINER, mode]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ, cwd=ROOT) as trainer:
        assert trainer.stdout is not None
        homes = trainer.stdout.readline().split()
        assert len(homes) >= 1 and members(homes[0])
        trainer.kill()
    until = time.monotonic() + 2.0
    while time.monotonic() < until and any(members(home) for home in homes):
        time.sleep(0.02)
    assert [members(home) for home in homes] == [[] for _ in homes]


def test_descriptors_do_not_leak(mode: str) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    with SandboxPool(LIMITS, mode, warm=0) as pool:
        asyncio.run(one(pool, "1"))
        before = count()
        for _ in range(5):
            asyncio.run(one(pool, "import os; os._exit(1)"))
            asyncio.run(run_program(pool, "print(1)", "", 2.0))
        assert count() <= before
