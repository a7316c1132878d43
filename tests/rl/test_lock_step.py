# ruff: noqa: F811  (`base` is a fixture)
"""Rollouts on weights that are cut: what a whole copy draws, whoever has more to draw; no rank waits for ever."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rl.groups
import rl.loop
from conf.schema import OptimConfig, ParallelConfig, PrecisionConfig, RLConfig
from rl.messages import RolloutRequest
from rl.rollout.lock_step import LockStep
from rl.rollout.native import NativeEngine
from rl.rollout.rollout_copy import RolloutCopy
from tests.distributed.helper import run_ranks
from tests.rl.test_loop import RL, base, config, go, rows  # noqa: F401
from tests.rl.test_update import Numbers
from tests.train import tiny
from train import distributed
from train.engine import Engine
from train.optim import build_optimizer
from train.parallel.ep import ExpertParallel

CUT = {
    "2-zero3": (2, {"zero": 3, "persist_below": 0}),
    "2-zero1-ep2": (2, {"zero": 1, "ep": 2}),
    "2-zero3-ep2": (2, {"zero": 3, "ep": 2, "persist_below": 0}),
    "4-zero3-ep2-cp2": (4, {"zero": 3, "ep": 2, "cp": 2, "persist_below": 100}),
}
DRAWN = replace(RL, top_p=0.95, mini_batches=2, keep_selection=True)

UNEVEN = replace(DRAWN, prompts_per_step=2, tasks=("words", "counting"), pack_len=120)


@pytest.fixture(autouse=True)
def shorter_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl.groups, "total_reward", lambda parts, rl: 1.0 - parts["length"])


def samples(folder: Path) -> list[tuple[Any, ...]]:
    shown = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [(row["step"], row["prompt"], row["text"], row["finish_reason"], row["tokens"]) for row in shown]


@pytest.mark.parametrize(
    ("layout", "precision", "drawn"),
    [
        *((name, "fp32", DRAWN) for name in CUT),
        ("2-zero3", "bf16", DRAWN),
        # one rank has samples that go on where the other has none, and prompts of many lengths
        ("2-zero3-ep2", "fp32", replace(UNEVEN, rollout_tokens=5)),
        ("2-zero1-ep2", "fp32", replace(DRAWN, dynamic_sampling=True, group_size=2, stop=("a", "1"))),
    ],
)
def test_ranks_draw_together_what_each_would_draw_on_a_copy(
    layout: str, precision: str, drawn: RLConfig, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    world, fields = CUT[layout]
    for name in ("copy", "lock_step"):
        run = config(
            tmp_path / name, base, rl=replace(drawn, rollout_copy=name == "copy"), steps=3,
            parallel=ParallelConfig(**fields),
        )  # fmt: skip
        assert go(replace(run, precision=PrecisionConfig(precision)), world) == ["finished"] * world
        monkeypatch.setattr(RolloutCopy, "__init__", lambda *_: pytest.fail("a copy was made"))
    assert samples(tmp_path / "copy") == samples(tmp_path / "lock_step") and samples(tmp_path / "copy")
    for one, other in zip(rows(tmp_path / "copy"), rows(tmp_path / "lock_step"), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            near = value if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)
            assert other[name] == near, (one["step"], name)


WORK = {  # (tokens of the prompt, tokens to draw) by rank
    "one has nothing": [[(3, 20), (40, 2)], []],
    "one is done early": [[(2, 3)], [(5, 17), (5, 17), (30, 9)]],
    "one reads while the other draws": [[(9, 12), (9, 12)], [(70, 4), (1, 12)]],
    "many places and few": [[(n, 1 + n % 7) for n in range(1, 30, 3)], [(4, 1)]],
}


def _draw(kind: str, fields: dict[str, Any]) -> int:
    """The same samples on the cut weights as on a whole copy, and on all ranks the same forwards in the same order ->
    how many samples there were."""
    parallel, me = ParallelConfig(**fields), distributed.rank()
    net = tiny.build()
    whole = deepcopy(net)
    ExpertParallel(parallel.ep).cut(net)
    net.mtp.requires_grad_(False)
    optim = OptimConfig(lr=1e-3)
    Engine(net, build_optimizer(net, optim), optim, parallel)
    requests = [
        RolloutRequest(i, 0, "", "", "", tuple((7 * i + j) % 60 + 2 for j in range(prompt)), 50 * me + i, size)
        for i, (prompt, size) in enumerate(WORK[kind][me])
    ]
    met: list[str] = []
    lock_step = LockStep(net, "sparse")
    turn, run_empty = lock_step.turn, lock_step._run_empty
    lock_step.turn = lambda wanted: (turn(wanted), met.append(wanted))[0]  # type: ignore[method-assign]
    lock_step._run_empty = lambda now: (met.append(now), run_empty(now))[1]  # type: ignore[method-assign]
    together = NativeEngine(net, Numbers(), RL, lock_step=lock_step).generate(requests)  # type: ignore[arg-type]
    alone = NativeEngine(whole, Numbers(), RL).generate(requests)  # type: ignore[arg-type]
    for one, other in zip(together, alone, strict=True):
        assert one.tokens.ids == other.tokens.ids and one.finish_reason == other.finish_reason
        assert one.tokens.behaviour_logprobs == pytest.approx(other.tokens.behaviour_logprobs, abs=1e-5)
        assert torch.equal(one.tokens.routed_experts, other.tokens.routed_experts)
        assert torch.equal(one.tokens.selected, other.tokens.selected)
    everyone = distributed.gather_objects(met)
    assert everyone[0] == everyone[1] and everyone[0][-1] == "done", everyone
    return len(together)


@pytest.mark.parametrize("fields", [{"zero": 1, "ep": 2}, {"zero": 3, "persist_below": 0, "ep": 2}, {"zero": 3}])
@pytest.mark.parametrize("kind", WORK)
def test_ranks_with_unequal_work_meet_in_every_forward(
    kind: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("model.generate.PREFILL_CHUNK", 8)  # long prompts are read in many forwards
    assert run_ranks(_draw, 2, kind, fields) == [len(work) for work in WORK[kind]]
