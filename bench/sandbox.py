"""What a sandbox costs a rollout: milliseconds to start one and to call it, and 64 sessions at once in time and memory.

Each way to isolate that works here has its row; the times are over the pool, as a tool has them. Memory is the
proportional share of everything that the pool started, so that pages which sandboxes share count once.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.registry import benchmark
from conf.errors import UserError
from rl.sandbox import Limits, SandboxPool, find_protection, run_program

ROUNDS, SESSIONS = 20, 64
MAX_WARM_MS = 50.0  # a session taken and its first call answered
CELL = "sum(range(1000))"
WORK = "total = 0\nfor i in range(200_000): total += i * i\ntotal"


def started_by(pid: int) -> list[int]:
    """All descendants."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {pid})


def share_bytes(pids: list[int]) -> int:
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


async def median_ms(work: Callable[[], Awaitable[object]], rounds: int = ROUNDS) -> float:
    times = []
    for _ in range(rounds):
        start = time.monotonic()
        await work()
        times.append(1000 * (time.monotonic() - start))
    return round(statistics.median(times), 2)


async def single(mode: str) -> dict[str, Any]:
    """One caller at a time."""

    async def cold() -> None:
        session = await empty.session()
        await session.run(CELL)
        await session.close()

    async with SandboxPool(Limits(), mode, warm=0) as empty:
        row: dict[str, Any] = {"cold_start_and_call_ms": await median_ms(cold)}
    async with SandboxPool(Limits(), mode, warm=4) as pool:
        times = []
        for _ in range(ROUNDS):
            while len(pool._ready) < pool.warm:
                await asyncio.sleep(0.005)
            start = time.monotonic()
            session = await pool.session()
            await session.run(CELL)
            times.append(1000 * (time.monotonic() - start))
            await session.close()
        row |= {"warm_start_and_call_ms": round(statistics.median(times), 2), "warm_worst_ms": round(max(times), 2)}
        session = await pool.session()
        row["call_ms"] = await median_ms(lambda: session.run(CELL), 200)
        await session.close()
        row["program_ms"] = await median_ms(lambda: run_program(pool, "print(input())", "1", 10.0))
    return row


async def together(mode: str) -> dict[str, Any]:
    """SESSIONS sessions open at once, each making the same calls."""
    async with SandboxPool(Limits(), mode, warm=4, sessions=SESSIONS) as pool:
        start = time.monotonic()
        sessions = await asyncio.gather(*(pool.session() for _ in range(SESSIONS)))
        opened = time.monotonic()
        first = await asyncio.gather(*(session.run(WORK) for session in sessions))
        called = time.monotonic()
        processes = started_by(os.getpid())
        row = {
            "open_s": round(opened - start, 2),
            "call_each_s": round(called - opened, 2),
            "mib_a_session": round(share_bytes(processes) / 2**20 / (SESSIONS + len(pool._ready)), 1),
        }
        assert {done.output for done in first} == {first[0].output} and first[0].error is None
        used = os.times()
        await asyncio.sleep(2.0)
        idle = os.times()
        row["trainer_idle_cpu_percent"] = round(50 * abs(idle.user + idle.system - used.user - used.system), 1)
        start = time.monotonic()
        await asyncio.gather(*(session.close() for session in sessions))
        row["close_s"] = round(time.monotonic() - start, 2)
    return row


@benchmark
def sandbox() -> dict[str, Any]:
    """Start and call of a sandbox, warm and cold, and 64 at once, for each way to isolate that works here."""
    rows = []
    for mode in ("bubblewrap", "namespaces"):
        try:
            find_protection(mode)
        except UserError as error:
            print(f"{mode}: left out ({error})")
            continue
        row = {"protection": mode, **asyncio.run(single(mode)), **asyncio.run(together(mode))}
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
    config = {"limits": asdict(Limits()), "rounds": ROUNDS, "sessions": SESSIONS, "max_warm_ms": MAX_WARM_MS}
    passed = bool(rows) and all(row["warm_start_and_call_ms"] <= MAX_WARM_MS for row in rows)
    return {"config": config, "rows": rows, "passed": passed}
