"""Runs a function on N gloo processes, forked from this one, which has imported everything."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from train.engine import import_deepspeed

LIMIT_S = 1200.0  # of a case


def _entry(function: Callable[..., Any], rank: int, world: int, store: str, sender: Connection, args: Any) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        sender.send_bytes(pickle.dumps((True, function(*args))))
    except BaseException:  # a process boundary: the parent reports it
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))


def run_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """`function(*args)` on `world` ranks -> what each returned, by rank. RuntimeError with the first failure."""
    import_deepspeed()
    import torch._dynamo  # noqa: F401  (before the fork: initialize would import it)

    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        processes = [
            context.Process(target=_entry, args=(function, rank, world, f"{folder}/store", sender, args), daemon=True)
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        try:
            return [_answer(receiver, rank) for rank, (receiver, _) in enumerate(pipes)]
        finally:
            for process in processes:
                process.kill()
                process.join()
            Path(folder, "store").unlink(missing_ok=True)


def _answer(receiver: Connection, rank: int) -> Any:
    if not wait([receiver], LIMIT_S):
        raise RuntimeError(f"rank {rank} gave no answer within {LIMIT_S:.0f} s")
    fine, value = pickle.loads(receiver.recv_bytes())
    if not fine:
        raise RuntimeError(f"rank {rank} failed:\n{value}")
    return value
