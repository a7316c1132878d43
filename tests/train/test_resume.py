"""A run that was killed or stopped and goes on ends in the same bits as one that was not."""

from __future__ import annotations

import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conf.errors import UserError
from conf.schema import ParallelConfig
from tests.distributed.helper import run_ranks
from tests.train import runs
from train.checkpoint import newest, read_state

CASES = [("pretrain", 0, 2), ("dense_warmup", 2, 1), ("sparse_adapt", 2, 2), ("sft", 1, 1)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished pretraining run that the other stages start from."""
    folder = tmp_path_factory.mktemp("base") / "run"
    assert runs.go(runs.config(folder)) == ["finished"]
    return str(folder)


def start(stage: str, base: str) -> str | None:
    return None if stage == "pretrain" else base


@pytest.mark.parametrize(("stage", "zero", "world"), CASES)
def test_killed_run_ends_in_the_same_bits(stage: str, zero: int, world: int, base: str, tmp_path: Path) -> None:
    whole = runs.config(tmp_path / "whole", stage, zero=zero, init_from=start(stage, base))
    killed = runs.config(tmp_path / "killed", stage, zero=zero, init_from=start(stage, base))
    saved = tmp_path / "killed/checkpoints/step_4"
    assert runs.go(whole, world) == ["finished"] * world
    with pytest.raises(AssertionError):
        runs.go(killed, world, runs.die_at(4 * 2 * world + 1, saved))  # in step 5, after step 4 was saved and logged
    assert newest(tmp_path / "killed") == saved
    assert runs.go(killed, world) == ["finished"] * world
    runs.assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert [row["step"] for row in runs.rows(tmp_path / "killed")] == [1, 2, 3, 4, 5, 6]


def test_kill_between_two_checkpoints_repeats_the_steps_once(tmp_path: Path) -> None:
    assert runs.go(runs.config(tmp_path / "whole", save_every=4)) == ["finished"]
    hook = runs.die_at(10, tmp_path / "killed/checkpoints/step_4")
    with pytest.raises(AssertionError):
        runs.go(runs.config(tmp_path / "killed", save_every=4), hook=hook)  # step 5 is logged, not saved
    assert [row["step"] for row in runs.rows(tmp_path / "killed")] == [1, 2, 3, 4, 5]
    assert runs.go(runs.config(tmp_path / "killed", save_every=4)) == ["finished"]
    runs.assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_kill_before_the_export_leaves_only_the_export_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs.go(runs.config(tmp_path / "whole")) == ["finished"]
    with monkeypatch.context() as patch:
        patch.setattr(runs.RunContext, "export", lambda *_: os._exit(9))
        with pytest.raises(AssertionError):
            runs.go(runs.config(tmp_path / "killed"))
    assert not (tmp_path / "killed" / "hf").exists()
    assert runs.go(runs.config(tmp_path / "killed"), hook=runs.die_at(12)) == ["finished"]  # no step is taken
    runs.assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_sigterm_on_one_rank_stops_all_after_the_same_saved_step(tmp_path: Path) -> None:
    def hook(asked: int) -> None:
        if asked == 10:  # rank 1's, in step 3
            os.kill(os.getpid(), signal.SIGTERM)

    more = {"save_every": 5, "log_every": 2}  # the row of step 4 has losses from before the stop
    whole, stopped = (runs.config(tmp_path / name, **more) for name in ("whole", "stopped"))
    assert runs.go(whole, 2) == ["finished"] * 2
    assert runs.go(stopped, 2, hook) == ["exit 143"] * 2
    assert (tmp_path / "stopped/preempted").read_text() == "step 3\n"
    assert read_state(tmp_path / "stopped/checkpoints/step_3").data_position == 12
    assert runs.go(stopped, 2) == ["finished"] * 2
    assert not (tmp_path / "stopped/preempted").exists()
    runs.assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_finished_run_is_not_run_again_and_can_be_extended(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert runs.go(runs.config(folder)) == ["finished"]
    assert runs.go(runs.config(folder)) == ["finished before"]
    assert runs.go(runs.config(folder, steps=8, log_every=3, save_every=3)) == ["finished"]
    assert [row["step"] for row in runs.rows(folder)] == [1, 2, 3, 4, 5, 6, 8]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 3}, r"train.seed=3 \(was 0\)"),
        ({"optim": runs.OptimConfig(lr=0.5, warmup_steps=2)}, r"optim.lr=0.5 \(was 0.003\)"),
        ({"model": replace(runs.MODEL, hidden_size=64)}, r"model.hidden_size=64 \(was 32\)"),
        ({"resume": "never"}, "holds a run and resume=never"),
        ({"stage": "sft"}, "holds a run of stage pretrain"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(changes: dict, named: str, base: str) -> None:
    def attempt() -> str:
        try:
            runs.open_run(runs.config(Path(base), **changes), frozenset())
        except UserError as error:
            return str(error)
        return "accepted"

    (message,) = run_ranks(attempt, 1)
    assert re.search(named, message), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 16},
        {"hidden_size": 64},
        {"num_hidden_layers": 3},
        {"n_routed_experts": 8},
        {"routed_scaling_factor": 2.0},  # no tensor shows it
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(change: dict, base: str, tmp_path: Path) -> None:
    """As where somebody copies checkpoints into the folder of another run."""
    run = runs.config(tmp_path / "run", model=replace(runs.MODEL, **change))
    shutil.copytree(Path(base) / "checkpoints", tmp_path / "run/checkpoints")
    (key, value), old = *change.items(), getattr(runs.MODEL, next(iter(change)))
    refusal = rf"(?m)UserError: .*step_6 belongs to another architecture: model.{key}={value} \(there {old}\); give .*$"
    with pytest.raises(AssertionError, match=refusal):
        runs.go(run)


LAYOUTS = {  # name -> (processes, ParallelConfig, micro-batches of four sequences a step)
    "1": (1, ParallelConfig(zero=1), 4),
    "1-zero0": (1, ParallelConfig(zero=0), 4),
    "2": (2, ParallelConfig(zero=1), 2),
    "2-zero2": (2, ParallelConfig(zero=2), 2),
    "2-zero3": (2, ParallelConfig(zero=3, persist_below=100), 2),  # the small parameters stay whole
    "2-zero3-ep2": (2, ParallelConfig(zero=3, ep=2, persist_below=0), 2),
    "2-ep2": (2, ParallelConfig(zero=1, ep=2), 2),
    "2-cp2": (2, ParallelConfig(zero=1, cp=2), 4),
    "2-zero2-cpu": (2, ParallelConfig(zero=2, offload="cpu"), 2),
    "2-zero3-cpu": (2, ParallelConfig(zero=3, persist_below=100, offload="cpu", offload_parameters=True), 2),
    "2-zero3-ep2-cpu": (2, ParallelConfig(zero=3, ep=2, persist_below=0, offload="cpu"), 2),
    "4-zero2-ep2-cp2": (4, ParallelConfig(zero=2, ep=2, cp=2), 2),
}
CHANGES = [
    *(
        ("2", "1"),
        ("1", "2"),
        ("2", "4-zero2-ep2-cp2"),
        ("2", "2-zero3"),
        ("2-zero3", "2-zero2"),
        ("1-zero0", "2-zero3"),
    ),
    *(("2-ep2", "1"), ("2", "2-ep2"), ("2-zero3-ep2", "2-ep2"), ("2", "2-cp2"), ("4-zero2-ep2-cp2", "1-zero0")),
    *(("2-zero2-cpu", "2"), ("2", "2-zero3-cpu"), ("2-zero3-cpu", "2-zero2-cpu"), ("2-ep2", "2-zero3-ep2-cpu")),
]


@pytest.mark.parametrize(("first", "then"), CHANGES)
@pytest.mark.parametrize("stage", ["dense_warmup", "sparse_adapt"])
def test_a_run_goes_on_in_another_layout(stage: str, first: str, then: str, base: str, tmp_path: Path) -> None:
    def run(name: str, layout: str) -> tuple[runs.RunConfig, int]:
        world, parallel, micro_batches = LAYOUTS[layout]
        # eps above the rounding of tiny gradients, which AdamW would otherwise blow up to whole steps
        optim = runs.OptimConfig(warmup_steps=2, eps=1e-4)
        fields = {"parallel": parallel, "micro_batches": micro_batches, "optim": optim}
        return runs.config(tmp_path / name, stage, init_from=base, **fields), world

    assert runs.go(*run("whole", "1")) == ["finished"]
    saved = tmp_path / "changed/checkpoints/step_4"
    with pytest.raises(AssertionError):
        runs.go(*run("changed", first), runs.die_at(16, saved))  # the first sequence of step 5
    assert newest(tmp_path / "changed") == saved
    config, world = run("changed", then)
    assert runs.go(config, world) == ["finished"] * world
    mine, theirs = runs.rows(tmp_path / "changed"), runs.rows(tmp_path / "whole")
    assert [row["step"] for row in mine] == [1, 2, 3, 4, 5, 6]
    for row, wanted in zip(mine, theirs, strict=True):
        for key in {"loss/indexer_kl", "loss/lm", "optim/grad_norm"} & wanted.keys():
            assert row[key] == pytest.approx(wanted[key], rel=2e-5), (row["step"], key)
    start, ends = runs.weights(Path(base)), (runs.weights(tmp_path / "changed"), runs.weights(tmp_path / "whole"))
    for name, value in ends[1].items():
        moved = max(float((value - start[name]).norm()), 1e-6 * float(value.norm()))
        assert float((ends[0][name] - value).norm()) <= 1e-3 * moved, name


def test_another_number_of_sequences_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        runs.go(runs.config(tmp_path / "run"), hook=runs.die_at(8, tmp_path / "run/checkpoints/step_4"))
    refusal = "UserError: a step of .*step_4 took 2 sequences and here it would take 4 .*give train.micro_batches=1"
    with pytest.raises(AssertionError, match=refusal):
        runs.go(runs.config(tmp_path / "run"), world=2)


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))


DAMAGES = {
    "lost": (Path.unlink, "is missing"),
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:-1]), "were written"),
    "flipped": (flip_a_byte, "does not have the checksum"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_still_serves(kind: str, tmp_path: Path) -> None:
    damage, words = DAMAGES[kind]
    assert runs.go(runs.config(tmp_path / "whole"), 2) == ["finished"] * 2
    last = tmp_path / "run/checkpoints/step_4"
    with pytest.raises(AssertionError):
        runs.go(runs.config(tmp_path / "run"), 2, runs.die_at(17, last))
    damage(last / "rank_00001.safetensors")
    with pytest.raises(
        AssertionError, match=f"UserError: .*rank_00001.*{words}.*: delete .*step_4, and the run goes on"
    ):
        runs.go(runs.config(tmp_path / "run"), 2)
    shutil.rmtree(last)
    assert runs.go(runs.config(tmp_path / "run"), 2) == ["finished"] * 2
    runs.assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_changed_starting_weights_are_refused(base: str, tmp_path: Path) -> None:
    shutil.copytree(Path(base) / "hf", tmp_path / "start")
    run = runs.config(tmp_path / "run", "dense_warmup", init_from=str(tmp_path / "start"))
    with pytest.raises(AssertionError):
        runs.go(run, hook=runs.die_at(8, tmp_path / "run/checkpoints/step_4"))
    tensors = runs.load_file(tmp_path / "start" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1e-3
    save_file(tensors, tmp_path / "start" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match="belongs to other starting weights than init_from holds now"):
        runs.go(run)


def test_dense_warmup_leaves_the_trunk_and_keeps_no_state_for_it(base: str, tmp_path: Path) -> None:
    assert runs.go(runs.config(tmp_path / "run", "dense_warmup", init_from=base)) == ["finished"]
    before, after = runs.weights(Path(base)), runs.weights(tmp_path / "run")
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".indexer." in name}
    values = sum(value.numel() for name, value in before.items() if ".indexer." in name)
    saved = runs.load_file(tmp_path / "run/checkpoints/step_6/rank_00000.safetensors")
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        assert sum(part.numel() for key, part in saved.items() if key.endswith(f"|{kind}")) == values
