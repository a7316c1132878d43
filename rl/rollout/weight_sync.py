"""The trainer's weights to the servers, once an iteration: from disk, or by broadcast (rl/rollout/broadcast.py).

Each version has a label that no other run and no other start of this one has, so a server that holds weights from
anywhere else is told apart; it is stamped on every token that they draw. A server is paused while its weights change
and resumed after. From disk, a server that comes back later reads the present version by itself
(rl/rollout/fleet.py); by broadcast it waits for the next. All ranks bring their parts of the weights together, as an
export does; rank 0 alone talks to the servers.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import socket
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import ServersConfig
from model import Transformer
from model.hf_names import slots, stored_dtype
from rl.rollout.broadcast import NcclGroup, TorchGroup, free_port
from rl.rollout.dialect import QUICK_S
from rl.rollout.fleet import Fleet, Server, ServersLost, State
from rl.rollout.server_api import Failed, Refused
from rl.tools.loop_thread import LoopThread
from train import distributed

Read = Callable[[str, int | None], Tensor]  # our name, expert or None -> the whole tensor; all ranks call it
ATTEMPTS = 3  # at a broadcast, each without the servers that failed in the one before
JOIN_S = 120.0
REFUSE_S = 0.5


class WeightSync:
    """All ranks make one and call `push` alike. `folder`: of versions on disk; `tokenizer`: the folder that goes with
    them; `dtype`: of the weights as servers get them."""

    def __init__(
        self,
        fleet: Fleet,
        loop: LoopThread,
        settings: ServersConfig,
        folder: Path,
        tokenizer: Path | None,
        dtype: torch.dtype,
    ) -> None:
        self.fleet, self.loop, self.settings = fleet, loop, settings
        self.folder, self.tokenizer, self.dtype = folder, tokenizer, dtype
        self.leads = distributed.rank() == 0
        self.run = distributed.gather_objects(uuid.uuid4().hex[:8])[0]
        self.step: int | None = None
        self._sums: Any = None  # what a server says of the present weights
        self._group: TorchGroup | NcclGroup | None = None
        self._members: list[tuple[Server, int]] = []  # of the group, with how often each had been down

    def push(self, net: Transformer, read: Read, step: int, mode: str = "abort") -> None:
        """The weights as they stand after iteration `step`, once. All ranks call it, at the same time.

        mode: what becomes of samples in work, `abort` or `keep` (`Dialect.pause`). UserError or ServersLost on all
        ranks where it cannot be done.
        """
        if self.step == step:
            return
        label = f"{self.run}-{step}"
        if self.settings.sync == "disk":
            self._from_disk(net, read, label, step, mode)
        else:
            self._by_broadcast(net, read, label, step, mode)
        self.step = step

    def close(self) -> None:
        self.part()
        if self.leads and self.settings.sync == "disk":
            for old in self.folder.glob(f"{self.run}-*"):
                shutil.rmtree(old, ignore_errors=True)

    # From disk

    def _from_disk(self, net: Transformer, read: Read, label: str, step: int, mode: str) -> None:
        from model.hf import save_pretrained

        folder = (self.folder / label).absolute()
        save_pretrained(net, folder, self.dtype, self.tokenizer, read=read, writes=self.leads)

        def tell() -> None:
            self.loop.wait(self._tell(str(folder), label, step, mode))
            for old in self.folder.glob(f"{self.run}-*"):
                if old != folder:
                    shutil.rmtree(old, ignore_errors=True)

        self.of_leader(tell)
        self._others_see(label, step)

    async def _tell(self, folder: str, label: str, step: int, mode: str) -> None:
        fleet, limit = self.fleet, self.settings.sync_s

        async def load(server: Server, mode: str = "abort") -> None:
            """Where it fails the server stays paused; a look that finds it well resumes it."""
            await fleet.dialect.pause(server.api, mode, limit)
            await fleet.dialect.load(server.api, folder, limit)

        async def load_late(server: Server) -> None:
            await load(server)
            if self._sums is not None and await self._sums_of(server) != self._sums:
                raise Failed(f"{server.url} read {folder} and holds other weights than the other servers")
            await self.put_to_work(server, label)

        held = await fleet.hold()
        fleet.load = None  # who comes meanwhile waits: it would get the version before
        fleet.expect(label, step)
        failures = await each(held, lambda server: load(server, mode))
        failures |= await self.compare([server for server in held if server not in failures])
        well = [server for server in held if server not in failures]
        failures |= await each(well, lambda server: self.put_to_work(server, label))
        fleet.load = load_late
        await fleet.free(held, failures)
        await fleet.until(State.READY)

    # By broadcast

    def _by_broadcast(self, net: Transformer, read: Read, label: str, step: int, mode: str) -> None:
        failed: set[Server] = set()
        for attempt in range(ATTEMPTS):
            sending = _Sending(self, label, step, mode, failed) if self.leads else None
            for bucket in buckets(net, read, self.dtype, self.settings.bucket_mib << 20):
                if sending is not None:
                    sending.send(bucket)
            fault: Exception | None = distributed.gather_objects(None if sending is None else sending.finish())[0]
            if fault is None:
                break
            if not isinstance(fault, Failed):
                raise fault
            if sending is not None:
                failed |= set(sending.failures)
            if attempt + 1 == ATTEMPTS:
                raise ServersLost(f"the weights of iteration {step} came to no server: {fault}")
        self._others_see(label, step)

    def meet(self, held: list[Server]) -> dict[Server, str]:
        """Has a group with all processes of these servers, made anew where one is another than before -> those that
        did not join, and why."""
        members = [(server, server.times_down) for server in held]
        if self._group is not None and members == self._members:
            return {}
        self.part()
        # also of a group that did not come about, or of a run before this one; who has none says so
        self.loop.wait(each(held, lambda server: self.fleet.dialect.leave(server.api)))
        sizes = [self.loop.wait(self.fleet.dialect.world_size(server.api)) for server in held]
        bare = self.fleet.dialect.name == "vLLM" and distributed.device().type == "cuda"
        group: TorchGroup | NcclGroup | None = NcclGroup() if bare else None
        info: dict[str, Any] = {
            "host": self.settings.address or socket.gethostname(),
            "port": free_port(),
            "world_size": 1 + sum(sizes),
            "backend": "nccl" if distributed.device().type == "cuda" else "gloo",
            "unique_id": group.unique_id if isinstance(group, NcclGroup) else None,
        }
        joins = [
            self.start(self.fleet.dialect.join(server.api, info, 1 + sum(sizes[:i]), JOIN_S + QUICK_S))
            for i, server in enumerate(held)
        ]
        wait(joins, REFUSE_S, FIRST_EXCEPTION)  # else the others wait in vain for one that refuses at once
        failures = refusals(held, joins)
        if not failures:
            try:
                if isinstance(group, NcclGroup):
                    group.meet(info["world_size"])
                else:
                    group = TorchGroup("localhost", info["port"], 0, info["world_size"], info["backend"], JOIN_S)
                self._group, self._members = group, members
                wait(joins)
            except RuntimeError:  # torch's own; a server that did not come may have said why
                if not refusals(held, joins):
                    raise
            failures = refusals(held, joins)
        for join in joins:
            join.cancel()
        return failures

    def broadcast(self, tensor: Tensor, check: Callable[[], None]) -> None:
        assert self._group is not None
        self._group.broadcast(tensor, check)

    def part(self) -> None:
        """Ends the group on this side."""
        if self._group is not None:
            self._group.close()
        self._group = None

    def start(self, work: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self.loop.loop)

    # Both

    async def compare(self, servers: list[Server]) -> dict[Server, str]:
        """Servers that hold other weights than most, by their own checksums."""
        self._sums = None
        if not self.settings.checksum or not servers:
            return {}
        failures: dict[Server, str] = {}
        found: dict[Server, Any] = {}

        async def ask(server: Server) -> None:
            found[server] = await self._sums_of(server)

        failures |= await each(servers, ask)
        known = {server: repr(value) for server, value in found.items() if value is not None}
        if not known:
            return failures
        most = Counter(known.values()).most_common(1)[0][0]
        for server, value in known.items():
            if value == most:
                self._sums = found[server]
            else:
                failures[server] = (
                    f"{server.url} holds other weights than the other servers after a sync; where they do not share one"
                    " parallel layout, their checksums cannot be compared: rl.servers.checksum=false"
                )
        return failures

    async def put_to_work(self, server: Server, label: str) -> None:
        await self.fleet.dialect.stamp(server.api, label)
        await self.fleet.dialect.resume(server.api)

    async def _sums_of(self, server: Server) -> Any:
        return await self.fleet.dialect.checksum(server.api, self.settings.sync_s) if self.settings.checksum else None

    def of_leader(self, action: Callable[[], None]) -> None:
        """Rank 0 does it; what hinders it is raised on all ranks."""
        fault: Exception | None = None
        if self.leads:
            try:
                action()
            except (UserError, ServersLost) as error:
                fault = error
        fault = distributed.gather_objects(fault)[0]
        if fault is not None:
            raise fault

    def _others_see(self, label: str, step: int) -> None:
        if not self.leads:
            self.fleet.expect(label, step)
            self.loop.wait(self.fleet.until(State.READY))


class _Sending:
    """One broadcast, on rank 0. After a failure `send` does nothing: the other ranks still bring tensors. `failed`:
    servers that are left out where there are others."""

    def __init__(self, sync: WeightSync, label: str, step: int, mode: str, failed: set[Server]) -> None:
        self.sync, self.label, self.fleet, self.limit = sync, label, sync.fleet, sync.settings.sync_s
        self.held: list[Server] = []
        self.failures: dict[Server, str] = {}
        self.fault: Exception | None = None
        dialect = self.fleet.dialect
        with self._faults():
            self.held = sync.loop.wait(self._hold(step, failed))
            self._of_all(lambda server: dialect.pause(server.api, mode, self.limit))
            self._refuse(sync.meet(self.held))
            self._of_all(lambda server: dialect.begin_receiving(server.api, self.limit))

    async def _hold(self, step: int, failed: set[Server]) -> list[Server]:
        self.fleet.load = None
        await self.fleet.until(State.FOUND, State.READY)
        held = await self.fleet.hold(failed)
        self.fleet.expect(self.label, step)
        return held

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Keeps the first for `finish`."""
        try:
            yield
        except (UserError, ServersLost, Failed) as fault:
            self.fault = fault
        except (Refused, RuntimeError) as fault:  # torch's own, where a group does not come about or breaks
            self.fault = Failed(" ".join(str(fault).split())[:300])

    def _of_all(self, ask: Callable[[Server], Awaitable[None]]) -> None:
        """Raises Failed where one of them fails: a group with a gap is none."""
        self._refuse(self.sync.loop.wait(each(self.held, ask)))

    def _refuse(self, failures: dict[Server, str]) -> None:
        self.failures |= failures
        if self.failures:
            raise Failed("; ".join(self.failures.values()))

    def send(self, bucket: dict[str, Tensor]) -> None:
        if self.fault is not None:
            return
        told = {name: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in bucket.items()}
        start, dialect = self.sync.start, self.fleet.dialect
        answers = [start(dialect.receive(server.api, told, self.limit)) for server in self.held]

        def check() -> None:
            for answer in answers:
                if answer.done():
                    answer.result()  # raises where a server has given up: the others wait for it in vain

        with self._faults():
            for tensor in bucket.values():
                self.sync.broadcast(tensor, check)
        if self.fault is not None:
            self.failures |= refusals(self.held, answers)  # the others fail because of these, and behind them
            self.sync.part()  # so that they see that nothing more comes
        wait(answers)
        with self._faults():
            if self.fault is None:
                self._refuse(refusals(self.held, answers))

    def finish(self) -> Exception | None:
        """None where every server that was there has all of it; else why not, and none of them may be asked."""
        dialect = self.fleet.dialect
        if self.fault is None:
            with self._faults():
                self._of_all(lambda server: dialect.end_receiving(server.api, self.limit))
                self._refuse(self.sync.loop.wait(self.sync.compare(self.held)))
                self._of_all(lambda server: self.sync.put_to_work(server, self.label))
        failures = self.failures
        if self.fault is not None:
            failures = {server: failures.get(server, f"{server.url}: {self.fault}") for server in self.held}
        self.sync.loop.wait(self.fleet.free(self.held, failures))
        return self.fault


def refusals(servers: list[Server], asked: list[Future[Any]]) -> dict[Server, str]:
    """What went wrong with those that have answered, one request each."""
    failures: dict[Server, str] = {}
    for server, answer in zip(servers, asked, strict=True):
        fault = answer.exception() if answer.done() else None
        if isinstance(fault, (Failed, Refused)):
            failures[server] = str(fault)
        elif fault is not None:
            raise fault
    return failures


async def each(servers: list[Server], ask: Callable[[Server], Awaitable[None]]) -> dict[Server, str]:
    """Does it with all of them at once -> those that failed, and why."""
    failures: dict[Server, str] = {}

    async def one(server: Server) -> None:
        try:
            await ask(server)
        except (Failed, Refused) as failure:
            failures[server] = str(failure)

    await asyncio.gather(*(one(server) for server in servers))
    return failures


def buckets(net: Transformer, read: Read, dtype: torch.dtype, max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The policy's tensors by Hugging Face's names, a few at a time, in `dtype` and on this rank's device. All ranks
    go through it; the MTP module, which does not learn in RL, is left out.

    A layer's attention is in one bucket, which may be larger for it: SGLang joins some of its matrices (q_a_proj and
    kv_a_proj_with_mqa, the indexer's wk and weights_proj) as it loads, and drops one that comes without the other.
    """
    found: dict[str, Tensor] = {}
    room, within = max_bytes, ""
    for slot in slots(net, net.config):
        if slot.ours.startswith("mtp.") or slot.is_copy:
            continue
        kept = stored_dtype(slot.hf_name, dtype)
        size = math.prod(slot.shape) * kept.itemsize
        layer, inside, _ = slot.hf_name.partition(".self_attn.")
        goes_on, within = bool(inside) and layer == within, layer if inside else ""
        if found and size > room and not goes_on:
            yield found
            found, room = {}, max_bytes
        value = read(slot.ours, slot.expert)
        found[slot.hf_name] = value.to(distributed.device(), kept).contiguous().clone()
        room -= size
    if found:
        yield found
