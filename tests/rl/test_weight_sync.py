# ruff: noqa: F811  (`base` is a fixture)
"""New weights where something goes wrong: what is not whole has no rank draw from it, and hinders nobody else."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.schema import ServersConfig
from model import Transformer
from rl.rollout.broadcast import TorchGroup, free_port
from rl.rollout.fleet import State
from rl.rollout.servers import ServerEngine
from rl.rollout.weight_sync import WeightSync
from tests.rl.servers.process import ServerProcess
from tests.rl.test_servers import QUICK, asked, base, decoding_of, one_thread, served  # noqa: F401
from train import distributed


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value])
    monkeypatch.setattr(distributed, "rank", lambda: 0)


@contextmanager
def syncing(engine: ServerEngine, folder: Path, sync: str, **more: Any) -> Iterator[WeightSync]:
    settings = ServersConfig(**{**vars(QUICK), "sync": sync, "address": "127.0.0.1", **more})
    found = WeightSync(engine.fleet, engine.loop, settings, folder, None, torch.float32)
    yield found
    found.close()


def reader(net: Transformer) -> Any:
    state = net.state_dict()
    return lambda name, expert: state[name] if expert is None else state[name][expert]


def test_weights_that_are_not_the_others_get_no_label(base: str, tmp_path: Path):
    """Every rank goes by the label, and rank 0 alone by checksums."""
    net = decoding_of(base, 0).net
    with served("vllm", base, 3) as servers, asked("vllm", [s.url for s in servers], base) as engine:
        servers[1].fault("spoil_weights", times=1000)
        with syncing(engine, tmp_path, "disk") as sync:
            sync.push(net, reader(net), 1)
            labels = [server.protocol.decoding.label for server in servers]
            assert labels == [f"{sync.run}-1", "default", f"{sync.run}-1"]
            servers[1].protocol.faults.clear()
            sync.push(net, reader(net), 2)
            assert {server.protocol.decoding.label for server in servers} == {f"{sync.run}-2"}


def test_a_broadcast_that_one_refuses_comes_to_the_others_and_a_second_run_joins_anew(base: str, tmp_path: Path):
    net = decoding_of(base, 0).net
    with ServerProcess(base, "sglang") as good, ServerProcess(base, "sglang") as bad:
        with asked("sglang", [good.url, bad.url], base) as engine:
            bad.fault("refuse_weights")
            with syncing(engine, tmp_path, "broadcast") as sync:
                sync.push(net, reader(net), 1)
                assert [server.state for server in engine.fleet.servers] == [State.READY, State.FOUND]
                sync.push(net, reader(net), 2)
                assert [server.state for server in engine.fleet.servers] == [State.READY, State.READY]
            with syncing(engine, tmp_path, "broadcast") as sync:  # nobody told the servers that the first one ended
                sync.push(net, reader(net), 1)
                assert [server.state for server in engine.fleet.servers] == [State.READY, State.READY]
                assert engine.fleet.label == f"{sync.run}-1"


def _joins(port: int, seconds: float) -> None:
    """A server that joins, and takes nothing."""
    TorchGroup("127.0.0.1", port, 1, 2, "gloo", 60)
    time.sleep(seconds)


def test_a_group_that_ends_in_the_middle_of_a_broadcast_is_waited_for_by_nobody():
    """Not by the garbage collector either, which runs in any thread: the servers' event loop stood still for it."""

    def give_up() -> None:
        if time.monotonic() > begin + 0.5:
            raise RuntimeError("a server has refused")

    port = free_port()
    peer = multiprocessing.get_context("fork").Process(target=_joins, args=(port, 60), daemon=True)
    peer.start()
    try:
        group, begin = TorchGroup("127.0.0.1", port, 0, 2, "gloo", 60), time.monotonic()
        with pytest.raises(RuntimeError, match="refused") as caught:  # its traceback holds the group
            group.broadcast(torch.ones(1000, 1000), give_up)
        begin = time.monotonic()
        group.close()
        del group, caught
        gc.collect()
        assert time.monotonic() - begin < 2.0
    finally:
        peer.kill()
        peer.join()
