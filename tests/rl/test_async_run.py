# ruff: noqa: F811  (`base` is a fixture)
"""Whole runs whose servers draw beside the updates: the bound on staleness, weights that change in flight and the
stamps of what is drawn meanwhile, a kill and what goes on from it, and a server that dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import rl.ahead
import rl.groups
from conf.schema import OptimConfig, ParallelConfig, RunConfig
from data.tokenizer import EOS
from model import Transformer
from rl.messages import Sample
from rl.rollout.served import Served
from tests.rl.models import saved, saying
from tests.rl.servers.process import ServerProcess
from tests.rl.test_loop import RL, config, go, rows
from tests.rl.test_served_run import NO_MASK, over, servers
from tests.train import runs, tiny
from train.checkpoint import newest

DRAWN = replace(RL, record_selection=None, max_staleness=2, max_new_tokens=40, pack_len=96, mini_batches=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Answers are long and of many lengths, so that updates come in their middle."""
    return saved(tmp_path_factory.mktemp("base"), saying({EOS: 2}))


@pytest.fixture(autouse=True)
def shorter_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl.groups, "total_reward", lambda parts, rl: 1.0 - parts["length"])


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which every rank keeps what each of its iterations took, VERSION_RANK, and the weights, netN."""
    folder, real = tmp_path / "seen", rl.ahead.AheadRollouts.groups
    folder.mkdir()

    def groups(self: Any) -> list[Sample]:
        found = real(self)
        torch.save([(s.request.seed, s.tokens.ids, s.tokens.weight_versions, s.tokens.loss_mask,
                     s.tokens.behaviour_logprobs) for s in found], folder / f"{self.version}_{self.rank}")  # fmt: skip
        return found

    give = Served.give

    def keep(self: Served, engine: Any, step: int) -> None:
        torch.save(engine.net.state_dict(), folder / f"net{step}")
        give(self, engine, step)

    monkeypatch.setattr(rl.ahead.AheadRollouts, "groups", groups)
    monkeypatch.setattr(Served, "give", keep)
    return folder


@cache
def net_of(folder: Path, version: int) -> Transformer:
    net = tiny.build(vocab_size=256)
    net.load_state_dict(torch.load(folder / f"net{version}"))
    return net


def taken(folder: Path) -> Iterator[tuple[int, Any]]:
    """(iteration of the weights, sample) of all that was trained."""
    for path in sorted(folder.glob("*_*")):
        for sample in torch.load(path, weights_only=False):
            yield int(path.name.partition("_")[0]), sample


@torch.no_grad()
def logprobs_of(net: Transformer, ids: list[int]) -> torch.Tensor:
    """Of each token but the first, by the trainer's own forward."""
    inputs = torch.tensor(ids[:-1])
    zeros = torch.zeros_like(inputs)
    found = net(
        input_ids=inputs, next_ids=zeros, labels=torch.tensor(ids[1:]), mtp_labels=zeros - 100,
        positions=torch.arange(len(inputs)), doc_start=zeros, attention="sparse", mtp=False,
    ).token_logprobs  # fmt: skip
    assert found is not None
    return found


def assert_bound(folder: Path, run: RunConfig) -> None:
    bound = run.rl.max_staleness
    for version, (_, _, versions, mask, _) in taken(folder):
        drawn_by = [by for by, drawn in zip(versions, mask, strict=True) if drawn]
        assert version - bound <= min(drawn_by) and max(drawn_by) <= version and drawn_by == sorted(drawn_by)
    seeds = [sample[0] for _, sample in taken(folder)]
    assert len(set(seeds)) == len(seeds) == run.train.steps * run.rl.prompts_per_step * run.rl.group_size
    for row in rows(Path(run.output_dir)):
        assert row["staleness/max"] <= bound and row["staleness/mean"] <= row["staleness/max"]
        assert 0 <= row["servers/idle_frac"] <= 1.01 and row["async/wait_s"] >= 0
        assert row["async/queued"] + row["async/in_flight"] <= (bound + 1) * run.rl.prompts_per_step


@pytest.mark.parametrize(
    ("protocol", "world", "sync", "parallel"),
    [
        ("vllm", 1, "disk", {}),
        ("sglang", 1, "broadcast", {}),
        ("vllm", 2, "broadcast", {"zero": 3, "persist_below": 0}),
    ],
)
def test_weights_change_in_flight_and_every_token_says_whose_it_is(
    protocol: str, world: int, sync: str, parallel: dict[str, int], base: str, tmp_path: Path, seen: Path
):
    with ServerProcess(base, protocol, places=2, missing=NO_MASK) as server:  # updates are short beside what it draws
        run = config(tmp_path / "run", base, steps=6, parallel=ParallelConfig(**parallel))
        # rates that move the weights far, so that a wrong stamp shows
        run = replace(run, rl=over(protocol, [server], DRAWN, sync=sync), optim=OptimConfig(lr=1e-2, warmup_steps=1))
        assert go(run, world) == ["finished"] * world
    assert_bound(seen, run)
    if world > 1:  # the weights are cut
        return
    assert any(row["staleness/mixed_frac"] > 0 for row in rows(tmp_path / "run"))
    assert sum(row["servers/asked_again"] for row in rows(tmp_path / "run")) == 0, "nothing was broken off for weights"
    checked, others = 0, 0.0
    for _, (_, ids, versions, mask, logprobs) in taken(seen):
        first = mask.index(True)
        stop = next((at for at in range(first, len(ids)) if versions[at] != versions[first]), len(ids))
        apart = (logprobs_of(net_of(seen, versions[first]), ids) - torch.tensor(logprobs[1:])).abs()
        assert float(apart[first - 1 : stop - 1].max()) < 1e-3
        if stop < len(ids):
            checked += 1
            others = max(others, float(apart[stop - 1 :].max()))
    assert checked and others > 1e-2, "behind an update the weights are others"


def test_a_killed_run_goes_on_with_what_had_come(base: str, tmp_path: Path, seen: Path):
    saved = tmp_path / "run/checkpoints/step_4"

    def die(iteration: int) -> None:
        if iteration == 6:
            runs.wait_for(saved)
            os._exit(9)

    with servers(base, "vllm", missing=NO_MASK) as found:
        run = replace(config(tmp_path / "run", base, steps=8), rl=over("vllm", found, DRAWN))
        with pytest.raises(AssertionError):
            go(run, 2, die)
        assert newest(tmp_path / "run") == saved
        assert go(run, 2) == ["finished"] * 2
    assert_bound(seen, run)
    found_rows = rows(tmp_path / "run")
    assert [row["step"] for row in found_rows] == list(range(1, 9))
    assert found_rows[4]["staleness/max"] > 0, "iteration 5 trains on what older weights drew before the kill"


def test_a_server_that_dies_in_the_middle(base: str, tmp_path: Path, seen: Path):
    with servers(base, "sglang", "sglang") as found:
        found[0].fault("die", after=20)
        run = replace(config(tmp_path / "run", base, steps=5), rl=over("sglang", found, DRAWN))
        assert go(run) == ["finished"]
        assert found[0].has_died
    assert_bound(seen, run)
    assert sum(row["servers/asked_again"] for row in rows(tmp_path / "run")) > 0
    assert rows(tmp_path / "run")[-1]["servers/ready"] == 1
