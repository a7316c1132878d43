# ruff: noqa: F811  (`base` is a fixture)
"""GRPO over servers in processes of their own: the samples and losses of the engine in this process, from disk and by
broadcast, on one rank and two, with tools, and across a server that dies in the middle of an iteration."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rl.groups
import rl.offer
import rl.rollout.tool_loop
import rl.rollout.trajectory
from conf.schema import ENVIRONMENT_LEVELS, ParallelConfig, RLConfig, ServersConfig
from rl.env.registry import ENVIRONMENTS
from tests.rl.servers.process import ServerProcess
from tests.rl.test_loop import RL, base, config, go, rows  # noqa: F401
from tests.rl.test_tool_loop import EchoWorld
from tests.rl.test_tools_run import TOOLS, taken_for_calls, without_calls

DRAWN = replace(RL, record_selection=None, top_p=0.95, top_k=40, mini_batches=2, beta=0.1, reference_refresh=2)
NO_MASK = ("return_sampling_mask",)  # which vLLM must not be started with where nothing is dropped
QUICK = ServersConfig(health_s=0.2, dead_s=60.0, address="127.0.0.1")


@pytest.fixture(autouse=True)
def shorter_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl.groups, "total_reward", lambda parts, rl: 1.0 - parts["length"])


@contextmanager
def servers(base: str, *protocols: str, missing: tuple[str, ...] = ()) -> Iterator[list[ServerProcess]]:
    with ExitStack() as stack:
        yield [stack.enter_context(ServerProcess(base, protocol, missing=missing)) for protocol in protocols]


def over(protocol: str, found: list[ServerProcess], drawn: RLConfig = DRAWN, **changes: Any) -> RLConfig:
    settings = replace(QUICK, urls=tuple(server.url for server in found), **changes)
    return replace(drawn, engine=protocol, servers=settings)


def shown(folder: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    names = ("step", "prompt", "text", "finish_reason", "tokens", "reward", "weight_versions")
    return [tuple(row[name] for name in names) for row in lines]


def assert_same_run(one: Path, other: Path, near: float = 1e-3) -> None:
    """The same samples; numbers to what rounding makes of them through a few of Adam's steps."""
    assert shown(one) == shown(other) and shown(one)
    for mine, theirs in zip(rows(one), rows(other), strict=True):
        assert "servers/ready" in theirs or theirs["step"] == 0
        for name, value in mine.items():
            if not name.startswith("mismatch/index"):  # no server was asked for what it selected
                assert theirs[name] == pytest.approx(value, rel=near, abs=2e-5), (mine["step"], name)


@pytest.mark.parametrize(
    ("protocol", "world", "sync", "parallel"),
    [
        ("vllm", 1, "disk", {}),
        ("sglang", 2, "disk", {"zero": 3, "ep": 2, "persist_below": 0}),
        ("vllm", 2, "broadcast", {"zero": 3, "persist_below": 0}),
        ("sglang", 1, "broadcast", {}),
    ],
)
def test_a_run_over_servers_is_the_run_in_process(
    protocol: str, world: int, sync: str, parallel: dict[str, int], base: str, tmp_path: Path
):
    drawn = replace(DRAWN, eval_every=2, eval_prompts=6)
    layout = ParallelConfig(**parallel) if parallel else ParallelConfig()
    run = config(tmp_path / "native", base, rl=drawn, steps=3, parallel=layout)
    assert go(run, world) == ["finished"] * world
    with servers(base, protocol, protocol) as found:
        mine = replace(
            config(tmp_path / "served", base, steps=3, parallel=layout),
            rl=over(protocol, found, drawn, sync=sync, bucket_mib=1),
        )
        assert go(mine, world) == ["finished"] * world
        counts = [
            server.post("/counts", {})["/generate" if protocol == "sglang" else "/inference/v1/generate"]
            for server in found
        ]
    assert_same_run(tmp_path / "native", tmp_path / "served")
    assert min(counts) > 10, "both servers drew"
    found_rows = [row for row in rows(tmp_path / "served") if row["step"]]
    assert all(row["mismatch/route_agree"] == 1.0 and row["mismatch/k3"] < 1e-8 for row in found_rows)
    assert not list((tmp_path / "served" / "servers").glob("*")), "versions on disk are taken away"


def test_a_server_that_dies_in_the_middle_of_an_iteration_and_comes_back(base: str, tmp_path: Path):
    """The only server, twice; it comes back with the weights that it was started with."""
    assert go(config(tmp_path / "native", base, rl=DRAWN, steps=3)) == ["finished"]
    with servers(base, "vllm") as (server,):
        server.fault("die", after=20)  # in the second iteration of 16 samples, behind the probe's
        over_it = threading.Event()

        def nurse() -> None:
            while not over_it.is_set():
                if server.has_died:
                    server.start()
                    died.append(1)
                over_it.wait(0.05)

        died: list[int] = []
        thread = threading.Thread(target=nurse)
        thread.start()
        mine = replace(config(tmp_path / "served", base, steps=3), rl=over("vllm", [server]))
        assert go(mine) == ["finished"]
        over_it.set()
        thread.join()
    assert died == [1]
    assert_same_run(tmp_path / "native", tmp_path / "served")
    assert sum(row["servers/asked_again"] for row in rows(tmp_path / "served")) > 0


@pytest.mark.parametrize("sync", ["disk", "broadcast"])
@pytest.mark.parametrize("kind", ["refuse_weights", "spoil_weights"])
def test_a_server_that_takes_weights_badly_is_given_them_again(kind: str, sync: str, base: str, tmp_path: Path):
    """It is found out by its answer, or by a checksum that is not that of the two others."""
    assert go(config(tmp_path / "native", base, rl=DRAWN, steps=2)) == ["finished"]
    with servers(base, "vllm", "vllm", "vllm") as found:
        found[1].fault(kind)
        mine = replace(config(tmp_path / "served", base, steps=2), rl=over("vllm", found, sync=sync))
        assert go(mine) == ["finished"]
        assert found[1].post("/counts", {})["/health"] > 0
    assert_same_run(tmp_path / "native", tmp_path / "served")


def test_one_step_off_and_partial_rollouts_need_no_copy(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = replace(DRAWN, one_step_off=True)
    assert go(config(tmp_path / "native", base, rl=drawn, steps=3)) == ["finished"]
    monkeypatch.setattr("rl.loop.RolloutCopy", lambda *_: pytest.fail("a copy was made"))
    with servers(base, "sglang") as found:
        mine = replace(config(tmp_path / "served", base, steps=3), rl=over("sglang", found, drawn))
        assert go(mine) == ["finished"]
        pieces = over("sglang", found, replace(drawn, rollout_tokens=4))
        assert go(replace(config(tmp_path / "pieces", base, steps=3), rl=pieces)) == ["finished"]
    assert_same_run(tmp_path / "native", tmp_path / "served")
    found_rows = rows(tmp_path / "pieces")
    assert any(row["rollout/carried"] > 0 for row in found_rows)
    ages = [row["rollout/staleness_mean"] for row in found_rows if row["rollout/staleness_mean"] is not None]
    assert ages and max(ages) > 1, "pieces of older weights keep their stamps"
    assert all(
        row.get("mismatch/route_agree", 1.0) <= 1.0 and row["rollout/missing_logprobs"] == 0 for row in found_rows
    )


def test_trajectories_with_tools_over_servers(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Messages after the first begin with other luck than in process, so the samples differ; the trainer must find
    the servers' log-probs and routes all the same, behind results and forks."""
    monkeypatch.setitem(ENVIRONMENT_LEVELS, "echo", 1)
    monkeypatch.setitem(ENVIRONMENTS, "echo", EchoWorld(more=1))
    monkeypatch.setattr(rl.rollout.tool_loop, "parse_turn", taken_for_calls)
    monkeypatch.setattr(rl.rollout.trajectory, "said_message", without_calls)
    monkeypatch.setattr(rl.offer.Offer, "schemas", lambda *_: [])  # which in bytes are longer than all the rest
    drawn = replace(TOOLS, record_selection=None, mini_batches=1)
    with ServerProcess(base, "vllm", length=256, missing=NO_MASK) as server:
        mine = replace(config(tmp_path, base, steps=2), rl=over("vllm", [server], drawn))
        assert go(mine) == ["finished"]
    for row in rows(tmp_path):
        assert row["tool/calls_mean"] > 0.3 and row["tool/rows_mean"] > 1
        assert row["mismatch/k3"] < 1e-8 and row["mismatch/route_agree"] == 1.0 and row["rollout/missing_logprobs"] == 0
