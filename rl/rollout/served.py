"""What a run has of its rollout servers (`rl.engine`, `rl.servers`): the engine that asks them, and their weights."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Self

import torch

from model import Transformer
from model.generate import Sampling
from rl.keys import read_key
from rl.rollout.dialect import Wanted
from rl.rollout.fleet import Fleet, State
from rl.rollout.servers import ServerEngine, dialect_of, wanted_of
from rl.rollout.weight_sync import WeightSync
from rl.tools.loop_thread import LoopThread
from train import distributed
from train.engine import Engine
from train.run import RunContext


class Served:
    """A context manager. `engine` draws as the run samples, `plain` from the whole distribution at temperature 1 (for
    held-out accuracy). Made before the model: UserError where a server is started in a way that cannot do."""

    def __init__(self, context: RunContext) -> None:
        config, rl, tokenizer = context.config, context.config.rl, context.tokenizer()
        eos_id = tokenizer.eos_token_id
        wanted, rank = wanted_of(rl, config.model, eos_id), distributed.rank()
        key = read_key("rl.servers.key_env", rl.servers.key_env, "servers")
        self.loop = LoopThread("servers")
        self.fleet = Fleet(dialect_of(rl), rl.servers, wanted, key, rank == 0, rank, context.say)
        self.engine = ServerEngine(self.fleet, self.loop, tokenizer, wanted, exact=not rl.max_staleness)
        self.mode = "keep" if rl.max_staleness else "abort"  # of what is in work while weights change
        plain = Wanted(Sampling(), config.model, eos_id, rl.stop)
        self.plain = ServerEngine(self.fleet, self.loop, tokenizer, plain)
        folder = context.folder / "servers" if rl.servers.folder is None else Path(rl.servers.folder)
        if rank == 0 and rl.servers.folder is None:
            shutil.rmtree(folder, ignore_errors=True)  # the version that a start that was killed left
        dtype = torch.float32 if config.precision.name == "fp32" else torch.bfloat16
        self.weights = WeightSync(self.fleet, self.loop, rl.servers, folder, context.folder / "tokenizer", dtype)
        self.sync_s = 0.0
        self.weights.of_leader(lambda: self.loop.wait(self.fleet.open()))
        if rank != 0:
            self.loop.wait(self.fleet.open())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.weights.close()
        self.loop.wait(self.fleet.close())
        self.loop.close()

    def give(self, engine: Engine, step: int) -> None:
        """The trainer's weights as they stand after iteration `step`, once; all ranks call it."""
        start = time.monotonic()
        net = engine.net
        assert isinstance(net, Transformer)
        self.weights.push(net, engine.whole, step, self.mode)
        self.sync_s += time.monotonic() - start

    def take_metrics(self) -> dict[str, float]:
        """Of this rank, since the last call: servers that may be asked, requests asked again, seconds of syncs; and the
        share of the time in which the mean server had no request, of the rank with most of them. All ranks call it."""
        asked_again = self.engine.asked_again + self.plain.asked_again
        self.engine.asked_again = self.plain.asked_again = 0
        seconds, self.sync_s = self.sync_s, 0.0
        ready = sum(server.state is State.READY for server in self.fleet.servers)
        idle = self.loop.wait(self.fleet.take_idle_frac())
        return {
            "servers/ready": ready,
            "servers/asked_again": asked_again,
            "servers/sync_s": seconds,
            "servers/idle_frac": -distributed.max_over_ranks(-idle),
        }
