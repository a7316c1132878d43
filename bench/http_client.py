"""What a request to a rollout server costs the trainer's interpreter: our client (aiohttp) against httpx.

    python -m bench http_client

A server in a process of its own answers each request after 50 ms, as one that draws does; the client has as many
requests in work as it would have samples. Measured is the CPU time of the client's thread, which a trainer that shares
its interpreter cannot compute in.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import httpx

from bench.registry import benchmark
from rl.rollout.server_api import ServerApi

AT_ONCE, ROUNDS, DRAWS_S = (1, 16, 48, 64, 256), 4, 0.05
ASKED, ANSWER = {"prompt": list(range(300))}, json.dumps({"token_ids": list(range(400))}).encode()
HEAD = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(ANSWER)}\r\n\r\n".encode()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(asyncio.IncompleteReadError, ConnectionResetError):  # the client has closed it
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            size = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(size.partition(b":")[2]))
            await asyncio.sleep(DRAWS_S)
            writer.write(HEAD + ANSWER)
            await writer.drain()
    writer.close()


async def _serve(port: Any) -> None:
    server = await asyncio.start_server(_answer, "127.0.0.1", 0, backlog=512)
    port.put(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def _process(port: Any) -> None:
    asyncio.run(_serve(port))


async def cpu_seconds(ask: Callable[[], Awaitable[object]], at_once: int) -> float:
    """Of this thread, a request."""

    async def one_after_another(count: int) -> None:
        for _ in range(count):
            await ask()

    await asyncio.gather(*(one_after_another(1) for _ in range(at_once)))  # connections are made
    rounds = max(ROUNDS, 32 // at_once)
    begin = time.thread_time()
    await asyncio.gather(*(one_after_another(rounds) for _ in range(at_once)))
    return (time.thread_time() - begin) / (rounds * at_once)


async def row(url: str, at_once: int) -> dict[str, Any]:
    api = ServerApi(url)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(timeout=None, limits=limits, verify=False, trust_env=False) as other:

        async def by_httpx() -> None:
            json.loads((await other.post(f"{url}/tokens", json=ASKED)).content)

        ours = await cpu_seconds(lambda: api.post("/tokens", ASKED, 60.0), at_once)
        theirs = await cpu_seconds(by_httpx, at_once)
    await api.close()
    return {"at_once": at_once, "ours_ms": round(1e3 * ours, 3), "httpx_ms": round(1e3 * theirs, 3)}


@benchmark
def http_client() -> dict[str, Any]:
    """CPU time of a request to a rollout server, our client against httpx (half a minute)."""
    context = multiprocessing.get_context("fork")
    port = context.SimpleQueue()
    server = context.Process(target=_process, args=(port,), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{port.get()}"
    rows = []
    for at_once in AT_ONCE:
        rows.append(asyncio.run(row(url, at_once)))
        print(rows[-1], flush=True)
    server.kill()
    return {"config": {"draws_s": DRAWS_S}, "rows": rows, "passed": all(r["ours_ms"] < r["httpx_ms"] for r in rows)}
