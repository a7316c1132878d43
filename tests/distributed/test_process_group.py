"""Ranks meet after a restart though the nodes that started them count their attempts differently."""

from __future__ import annotations

import multiprocessing
import os
import socket

from train import distributed


def meet(rank: int, port: int, results: multiprocessing.SimpleQueue) -> None:
    """A rank as the agent of its node starts it: rank 0's node restarted for the other's sake, and counts nothing."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "TORCHELASTIC_RESTART_COUNT": str(rank)}
    with distributed.process_group():
        results.put(distributed.gather_objects(rank))


def test_ranks_with_different_restart_counts_meet() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    ranks = [context.Process(target=meet, args=(rank, port, results), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(30)
        assert [process.exitcode for process in ranks] == [0, 0]
        assert [results.get(), results.get()] == [[0, 1], [0, 1]]
    finally:
        for process in ranks:
            process.kill()
