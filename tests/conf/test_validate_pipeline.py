"""The rules of pipeline parallelism: what a schedule cannot run is refused with what it can, and torch agrees."""

from __future__ import annotations

import pytest

from conf.load import load
from conf.validate import violations
from conf.validate_pipeline import PARTS, micro_batches_needed
from train.parallel.schedules import table


def found(argv: str, stage: str = "sparse_adapt", world_size: int = 4) -> list[str]:
    return violations(load([f"+stage={stage}", *argv.split()]).config, world_size)


DEEP = "model.num_hidden_layers=8 parallel.pp=4"


@pytest.mark.parametrize(
    "argv",
    [
        "parallel.pp=1",
        "parallel.pp=2 train.micro_batches=2",
        "parallel.pp=2 parallel.cp=2 parallel.ep=2 train.micro_batches=2",
        f"{DEEP} parallel.pp_schedule=interleaved train.micro_batches=10",
        f"{DEEP} parallel.pp_schedule=zbv train.micro_batches=4",
        f"{DEEP} parallel.pp_schedule=dualpipev train.micro_batches=8",
        "parallel.pp=2 train.micro_batches=2 precision=fp8",
    ],
)
def test_what_runs_is_accepted(argv: str) -> None:
    assert found(argv) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "parallel.pp=2",
            "train.micro_batches=1 cannot be run by parallel.pp_schedule=1f1b with parallel.pp=2: give"
            " train.micro_batches=2",
        ),
        (
            f"{DEEP} parallel.pp_schedule=interleaved train.micro_batches=11",
            "train.micro_batches=11 cannot be run by parallel.pp_schedule=interleaved with parallel.pp=4: give"
            " train.micro_batches=10",
        ),
        (
            f"{DEEP} parallel.pp_schedule=dualpipev train.micro_batches=7",
            "train.micro_batches=7 cannot be run by parallel.pp_schedule=dualpipev with parallel.pp=4: give"
            " train.micro_batches=8",
        ),
        (
            "parallel.pp=4 parallel.pp_schedule=zbv train.micro_batches=4",
            "parallel.pp=4 with parallel.pp_schedule=zbv cuts the model into 8 parts and model.num_hidden_layers=4 has"
            " fewer layers: use a smaller pp, or pp_schedule=1f1b",
        ),
        (
            "parallel.pp=3 train.micro_batches=4",
            "parallel.pp=3 does not divide the world of 4 processes: start a multiple of 3",
        ),
        (
            "parallel.pp=4 parallel.cp=2 train.micro_batches=4",
            "parallel.cp=2 does not divide the world of 4 processes over parallel.pp=4: start a multiple of 8",
        ),
        (
            "parallel.pp_schedule=zbv",
            "parallel.pp_schedule=zbv has nothing to order in parallel.pp=1: give parallel.pp=2 or more",
        ),
        (
            "parallel.pp=2 parallel.pp_schedule=zb1p train.micro_batches=2",
            "parallel.pp_schedule=zb1p is not known: valid: 1f1b, interleaved, zbv, dualpipev",
        ),
        (
            "parallel.pp=2 train.micro_batches=2 parallel.zero=2",
            "parallel.pp=2 has an optimiser of its own, which shares out its state alone: use parallel.zero=1",
        ),
        (
            "parallel.pp=2 train.micro_batches=2 parallel.offload=cpu",
            "parallel.pp=2 keeps the optimiser on the device: use parallel.offload=none",
        ),
        ("parallel.pp=0", "parallel.pp=0 is too small: give 1 or more"),
    ],
)
def test_what_cannot_run_is_refused(argv: str, message: str) -> None:
    assert found(argv) == [message]


@pytest.mark.parametrize("stage", ["grpo", "evaluate"])
def test_stages_whose_ranks_run_the_whole_model_are_refused(stage: str) -> None:
    wanted = f"parallel.pp=2 is not supported in stage {stage}, where a rank runs the whole model: use parallel.pp=1"
    assert wanted in found("parallel.pp=2 train.micro_batches=2", stage)


@pytest.mark.parametrize("schedule", PARTS)
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_torch_runs_what_is_accepted_and_little_else(schedule: str, pp: int) -> None:
    for given in range(1, 3 * pp + 2):
        needed = micro_batches_needed(schedule, pp, given)
        assert micro_batches_needed(schedule, pp, needed) == needed
        table(schedule, pp, needed)
        if needed != given and schedule in ("interleaved", "dualpipev") and given >= pp:
            with pytest.raises(ValueError, match="micro"):
                table(schedule, pp, given)
