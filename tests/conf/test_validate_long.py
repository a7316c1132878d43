"""The rules of long-context tasks: one line each, with the value, the reason and the fix; lists of whole numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conf.convert import from_dict, to_dict
from conf.errors import UserError
from conf.load import load
from conf.schema import DataConfig, EvalConfig, RunConfig
from conf.validate import violations

RUN = RunConfig(stage="evaluate", output_dir="runs/x")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"long_tasks": ("nedle",), "long_share": 0.1}, "data.long_tasks=nedle is not known: did you mean needle?"),
        ({"long_tasks": ("kv:3",), "long_share": 0.1}, "data.long_tasks=kv:3 has no such level: give kv:1 to kv:2"),
        ({"long_share": 0.5}, "data.long_share=0.5 has no tasks: give data.long_tasks=needle,kv or others"),
        ({"long_tasks": ("kv",)}, "data.long_tasks=kv has no share of the tokens: give data.long_share=0.1"),
        (
            {"long_tasks": ("kv",), "long_share": 0.7, "synthetic_share": 0.4},
            "data.long_share=0.7 and data.synthetic_share=0.4 are more than all: give less of one",
        ),
        (
            {"long_tasks": ("kv",), "long_share": 0.7, "long_min": 1024},
            "data.long_min=1024 is outside 10 to data.seq_len=512: give a value inside",
        ),
        (
            {"long_tasks": ("kv",), "long_share": 0.7, "long_max": 100},
            "data.long_max=100 is outside data.long_min=128 to data.seq_len=512: give a value inside",
        ),
        (
            {"long_tasks": ("kv",), "long_share": 1.5, "source": "synthetic"},
            "data.long_share=1.5 is outside [0, 1]: give a value inside",
        ),
    ],
)
def test_mix(data: dict, message: str) -> None:
    assert violations(replace(RUN, data=replace(DataConfig(), **data))) == [message]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": ("coppy",)}, "eval.tasks=coppy is not known: did you mean copy?"),
        ({"lengths": (64,)}, "eval.lengths=64 has no tasks to measure: give eval.tasks=needle,kv or others"),
        ({"tasks": ("kv",), "lengths": (64, 64)}, "eval.lengths=64,64 names a value twice: leave one out"),
        (
            {"tasks": ("kv", "copy", "kv")},
            "eval.tasks=kv,copy,kv names a task twice, whose problems are the same: leave one out",
        ),
        (
            {"tasks": ("kv",), "lengths": (40000,)},
            "eval.lengths=40000 is outside 10 to model.max_position_embeddings=32768: give a value inside",
        ),
        ({"tasks": ("kv",), "depths": 0}, "eval.depths=0 is too small: give 1 or more"),
    ],
)
def test_evaluation(given: dict, message: str) -> None:
    assert violations(replace(RUN, eval=EvalConfig(**given))) == [message]


def test_what_is_right_passes() -> None:
    data = DataConfig(long_tasks=("kv:2", "copy"), long_share=0.6, synthetic_share=0.4)
    assert violations(replace(RUN, data=data, eval=EvalConfig(tasks=("needle", "kv:2"), k_sweep=(8, 16)))) == []


def test_lists_of_whole_numbers_are_read() -> None:
    config = load(["+stage=evaluate", "eval.lengths=[512,1024]", "eval.tasks=needle,kv:2", "eval.k_sweep=64"]).config
    assert config.eval == EvalConfig(tasks=("needle", "kv:2"), lengths=(512, 1024), k_sweep=(64,))
    assert from_dict(to_dict(config)) == config
    assert load(["+stage=evaluate", "eval.lengths=512, 1024", "eval.k_sweep=[]"]).config.eval.lengths == (512, 1024)


@pytest.mark.parametrize("text", ["[512,x]", "1.5", "[[1]]", "{a: 1}"])
def test_lists_of_other_things_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="eval.lengths"):
        load(["+stage=evaluate", f"eval.lengths={text}"])
