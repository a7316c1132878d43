"""The rules of `eval.*`: each breaks in one line that names the value and the fix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from conf.errors import UserError
from conf.load import load
from conf.schema import EvalConfig, RunConfig
from conf.validate import violations, warnings


def run(**changes: Any) -> RunConfig:
    return RunConfig(stage="evaluate", output_dir="x", init_from="y", eval=replace(EvalConfig(), **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_sweep": (64, 0)}, "eval.k_sweep=0 is too small: give 1 or more"),
        ({"k_sweep": (64, 64)}, "eval.k_sweep names 64 2 times: give it once"),
        (
            {"k_sweep": (64,), "by_position": False},
            "eval.k_sweep has nothing to measure: give eval.by_position=true, or",
        ),
        ({"speed_lengths": (32768,)}, "eval.speed_lengths=32768 and 16 decoded tokens are past"),
        ({"compare_with": " "}, "eval.compare_with is empty"),
        ({"compare_with": "z", "by_position": False}, "eval.compare_with is compared by position"),
        ({"compare_attention": "spares"}, "eval.compare_attention=spares is not known: did you mean sparse?"),
        ({"harness_path": "z"}, "eval.harness_path=z has no task to find: give eval.harness=TASK"),
        ({"harness_limit": 0}, "eval.harness_limit=0 is too small"),
    ],
)
def test_rules(changes: dict[str, Any], message: str) -> None:
    found = violations(run(**changes))
    assert len(found) == 1 and found[0].startswith(message)


def test_what_is_right_breaks_none() -> None:
    assert violations(run(k_sweep=(8, 16), speed_lengths=(64,), harness=("arc_easy",), harness_path="z")) == []
    few = replace(run(), train=replace(run().train, eval_sequences=1))
    assert any("leaves no confidence interval" in line for line in warnings(few))


def test_lists_of_numbers_on_the_command_line() -> None:
    asked = ["+stage=evaluate", "eval.k_sweep=[8,16]", "eval.speed_lengths=64", "eval.harness=[a,b]"]
    found = load(asked).config.eval
    assert (found.k_sweep, found.speed_lengths, found.harness) == ((8, 16), (64,), ("a", "b"))
    with pytest.raises(UserError, match="eval.k_sweep"):
        load(["+stage=evaluate", "eval.k_sweep=[8,many]"])
