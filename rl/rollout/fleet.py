"""Several servers of one policy: which of them is asked, and what becomes of one that fails.

A server that answers, was found to return what the run needs, and holds the present weights is READY; requests go to
the READY one with the fewest of this rank's. Every server is looked at every `rl.servers.health_s`; one that fails is
asked nothing until a look finds it well again. One rank, the leader, brings servers that hold other weights (they were
restarted, or came late) to the present ones before they are READY; the other ranks wait until they see it done.

Everything here runs in one event loop; `rl/rollout/servers.py` calls it from outside.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from typing import Any

from conf.errors import UserError
from conf.schema import ServersConfig
from rl.rollout.dialect import ODD, Dialect, Wanted, unreadable
from rl.rollout.server_api import Failed, Gone, Refused, ServerApi

LOOK_S = 30.0  # that a look may take
MISSES = 3  # looks in a row that a server in use may miss


class State(Enum):
    DOWN = "down"  # does not answer, or may not be used
    FOUND = "found"  # answers as it should, and holds other weights
    LOADING = "loading"
    READY = "ready"


class ServersLost(RuntimeError):
    """There is no server to ask, for too long, or none that can answer a request."""


class Server:
    def __init__(self, api: ServerApi) -> None:
        self.api, self.url = api, api.url
        self.state, self.fault = State.DOWN, "not asked yet"
        self.misses = self.load = 0  # looks missed in a row; requests of this rank's in work
        self.times_down = 0
        self.spoilt = False  # an update of it failed: whatever its weights are called, they are not to be trusted
        self.said = ""  # the user was told of it, while it is DOWN
        self.doubted = False  # a request of it failed since the last look
        self.asked: set[asyncio.Task[dict[str, Any]]] = set()
        self._idle_s, self._since = 0.0, time.monotonic()
        self.lock = asyncio.Lock()  # of looks and loads
        self.look_now = asyncio.Event()

    def occupy(self, change: int) -> None:
        """That many requests more."""
        now = time.monotonic()
        self._idle_s += 0.0 if self.load else now - self._since
        self.load, self._since = self.load + change, now

    def take_idle_s(self) -> float:
        """Seconds since the last call without a request of this rank's."""
        self.occupy(0)
        found, self._idle_s = self._idle_s, 0.0
        return found


class Fleet:
    """`leader`: probes servers and gives them weights. `load`: how a server that came late gets the present ones (None
    while there is no way). `say`: a line for the user. `rank`: where it begins to count among idle servers."""

    def __init__(
        self,
        dialect: Dialect,
        settings: ServersConfig,
        wanted: Wanted,
        key: str,
        leader: bool,
        rank: int = 0,
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.dialect, self.settings, self.wanted, self.leader, self.say = dialect, settings, wanted, leader, say
        self.servers = [Server(ServerApi(url, key)) for url in settings.urls]
        self.order = {server: (i - rank) % len(self.servers) for i, server in enumerate(self.servers)}
        self.label: str | None = None  # of the present weights
        self.versions: dict[str, int] = {}  # label -> iteration, of this run
        self.load: Callable[[Server], Awaitable[None]] | None = None
        self.opened = False
        self._broken: BaseException | None = None  # a mistake at the start, or a fault of ours in a look
        self._changed = asyncio.Condition()
        self._seen_ready = self._idle_since = time.monotonic()
        self._looking: list[asyncio.Task[None]] = []

    # Looking after them

    async def open(self) -> None:
        """Looks at all of them, and returns when one is there. UserError where one is started in a way that cannot do,
        ServersLost where none is there for too long; closed then."""
        self._seen_ready = time.monotonic()
        try:
            await asyncio.gather(*(self.look(server) for server in self.servers))
            self._looking = [asyncio.create_task(self._look_after(server)) for server in self.servers]
            await self._until(lambda: any(server.state is not State.DOWN for server in self.servers))
        except BaseException:
            await self.close()
            raise
        self.opened = True

    async def close(self) -> None:
        for task in self._looking:
            task.cancel()
        for server in self.servers:
            await server.api.close()

    async def _look_after(self, server: Server) -> None:
        try:
            while True:
                await self.look(server)
                with suppress(TimeoutError):
                    async with asyncio.timeout(self.settings.health_s):
                        await server.look_now.wait()
                server.look_now.clear()
        except Exception as fault:  # a task's boundary: whoever waits next raises it
            self._broken = fault
            await self._notify()

    async def look(self, server: Server) -> None:
        """Finds out how it is, and brings it to the present weights where it holds others and that is ours to do."""
        async with server.lock:
            try:
                async with asyncio.timeout(LOOK_S):
                    if server.state is State.DOWN:
                        await self._admit(server)
                    else:
                        await self.dialect.health(server.api)
                    label = await self.dialect.weight_version(server.api)
                if label == self.label and not server.spoilt:
                    self._set(server, State.READY)
                elif self.label is not None and self.leader and self.load is not None:
                    await self._bring_up(server)
                else:
                    self._set(server, State.FOUND, f"{server.url} holds the weights {label}, not {self.label}")
                server.misses, server.doubted = 0, False
            except UserError as mistake:
                if not self.opened:
                    raise
                self._set(server, State.DOWN, str(mistake))
            except (Refused, Gone) as failure:
                self._set(server, State.DOWN, str(failure))
            except (Failed, TimeoutError) as failure:
                server.misses += 1
                if server.state is not State.READY or server.misses >= MISSES:
                    self._set(server, State.DOWN, str(failure) or f"{server.url} gave no answer within {LOOK_S:g} s")
        await self._notify()

    async def _admit(self, server: Server) -> None:
        """A server that was not there before: does it speak as it must?"""
        await self.dialect.health(server.api)
        await self.dialect.version(server.api)
        await self.dialect.weight_version(server.api)  # UserError where it takes no new weights
        if not self.leader:
            return
        await self.dialect.resume(server.api)  # whoever paused it may be gone
        try:
            await self.dialect.probe(server.api, self.wanted)
        except Refused as refusal:
            raise UserError(f"it refuses what this run asks for: {refusal}") from refusal
        except UserError:
            raise
        except ODD as error:
            raise unreadable(server.url, error) from error

    async def _bring_up(self, server: Server) -> None:
        assert self.load is not None
        self._set(server, State.LOADING)
        server.spoilt = True
        await self.load(server)
        server.spoilt = False
        self._set(server, State.READY)

    def _set(self, server: Server, state: State, fault: str = "") -> None:
        before, server.state, server.fault = server.state, state, fault
        if state is State.READY:
            self._seen_ready = time.monotonic()
        if state is State.DOWN and before is not state:
            server.times_down += 1
            for task in server.asked:  # its host may be gone, and then no connection ever ends by itself
                task.cancel()
        line = f"out: {fault}" if state is State.DOWN else "there again" if server.said else ""
        if line and line != server.said:
            self.say(f"rollout server {server.url} is {line}")
        server.said = line if state is State.DOWN else ""

    async def hold(self, failed: Collection[Server] = ()) -> list[Server]:
        """Everyone who is there, for new weights: nobody looks at them until `free`. Those that `failed` are left out
        where there are others."""
        held = [server for server in self.servers if server.state is not State.DOWN]
        held = [server for server in held if server not in failed] or held
        for server in held:
            await server.lock.acquire()
            if not server.asked:  # else weights change in flight: what is in work goes on
                self._set(server, State.LOADING)
        return held

    async def free(self, held: Sequence[Server], failures: Mapping[Server, str]) -> None:
        """They have the present weights, but for those that failed, which are looked at once."""
        for server in held:
            server.spoilt = failed = server in failures
            self._set(server, State.DOWN if failed else State.READY, failures.get(server, ""))
            server.lock.release()
            if failed:
                server.look_now.set()
        await self._notify()

    def expect(self, label: str, version: int) -> None:
        """What servers must hold from now on."""
        self.label, self.versions[label] = label, version
        self._seen_ready = time.monotonic()

    async def until(self, *states: State) -> None:
        """Looks at once, and waits until a server is in one of these."""
        await asyncio.gather(*(self.look(server) for server in self.servers))
        await self._until(lambda: any(server.state in states for server in self.servers))

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, holds: Callable[[], bool]) -> None:
        """Returns when it holds. ServersLost when no server has been READY for too long, and none is loading."""
        async with self._changed:
            while not holds():
                if self._broken is not None:
                    raise self._broken
                away = time.monotonic() - self._seen_ready
                loading = any(server.state is State.LOADING for server in self.servers)
                ready = any(server.state is State.READY for server in self.servers)
                if not (loading or ready) and away > self.settings.dead_s:
                    faults = "; ".join(server.fault for server in self.servers)
                    raise ServersLost(f"no rollout server for rl.servers.dead_s={self.settings.dead_s:g} s: {faults}")
                with suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await self._changed.wait()

    # Asking them

    async def take(self, failed: Mapping[Server, int] | None = None) -> Server:
        """The READY server with the fewest requests of this rank's; `release` it. `failed`: how often the request has
        failed where; it goes where that is least, for one that fails at once has the fewest requests."""
        failed = failed or {}

        def free() -> list[Server]:
            ready = [each for each in self.servers if each.state is State.READY]
            least = min((failed.get(each, 0) for each in ready), default=0)
            room = [each for each in ready if each.load < self.settings.concurrent and not each.doubted]
            return [each for each in room if failed.get(each, 0) == least]

        await self._until(lambda: bool(free()))
        server = min(free(), key=lambda each: (each.load, self.order[each]))
        server.occupy(+1)
        return server

    async def release(self, server: Server) -> None:
        server.occupy(-1)
        async with self._changed:
            self._changed.notify()

    async def take_idle_frac(self) -> float:
        """Share of the time since the last call in which the mean server had no request of this rank's."""
        before = self._idle_since
        idle = sum(server.take_idle_s() for server in self.servers) / len(self.servers)
        self._idle_since = time.monotonic()
        return idle / (self._idle_since - before)

    def doubt(self, server: Server) -> None:
        """It is asked nothing until the next look, which is at once."""
        server.doubted = True
        server.look_now.set()

    async def post(self, server: Server, path: str, body: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """As `ServerApi.post`; Failed as well where the server is found to be down meanwhile."""
        task = asyncio.create_task(server.api.post(path, body, timeout_s))
        server.asked.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            assert current is not None
            if current.cancelling():  # nobody wants this request any more
                raise
            raise Failed(f"{server.url} went away: {server.fault}") from None
        finally:
            task.cancel()
            server.asked.discard(task)
