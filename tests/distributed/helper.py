"""Runs a function on N gloo processes, forked so that nothing is imported again (0.2 s instead of 8 s)."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from train.engine import import_deepspeed

TIMEOUT = 300.0  # of a case; a machine with other work needs many times the seconds of an idle one


def _entry(function: Callable[..., Any], rank: int, world: int, store: str, results: Any, args: Any) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        answer = pickle.dumps(function(*args))  # here: torch's own pickling of tensors needs the sender alive
        results.put((rank, True, answer))
        dist.destroy_process_group()
    except BaseException:  # a process boundary: the parent reports it
        results.put((rank, False, traceback.format_exc()))


def run_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """`function(*args)` on `world` ranks -> what each returned, by rank: anything that can be pickled.

    Raises AssertionError with the traceback of the first rank that failed, or its status where it died.
    """
    import_deepspeed()  # before the fork, with what its first initialize would import
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    import torch._dynamo  # noqa: F401

    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        results, store = context.SimpleQueue(), str(Path(folder) / "store")
        processes = [
            context.Process(target=_entry, args=(function, rank, world, store, results, args), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            found = _collect(results, processes)
            for process in processes:
                process.join(5)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
    return [found[rank] for rank in range(world)]


def _collect(results: Any, processes: list[Any]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    deadline = time.monotonic() + TIMEOUT
    while len(found) < len(processes):
        dead = {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode}
        if not results.empty():
            rank, fine, value = results.get()
            assert fine, f"rank {rank} failed:\n{value}"
            found[rank] = pickle.loads(value)
            continue
        assert not dead, f"rank -> exit status of those that died: {dead}"
        assert time.monotonic() < deadline, f"no answer within {TIMEOUT:.0f} s but from ranks {sorted(found)}"
        time.sleep(0.01)
    return found
