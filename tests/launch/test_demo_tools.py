"""The tools' demo: its command lines are valid, its promises are checked against the numbers."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from conf.load import load
from conf.validate import violations
from launch import traces
from launch.demo_tools import FULL, MEASURED, SHORT, STAGES, Plan, check, commands, table, trace_commands

OUT = Path("runs/demo_tools")


def rows(**changed: float | None) -> dict[str, dict[str, float]]:
    found = {}
    for policy in MEASURED:
        for how, accuracy in (("eval", 0.6 if policy == "grpo" else 0.4), ("without_tools", 0.01)):
            row = {"accuracy": accuracy, **{name: accuracy for name in FULL.environments}}
            keys = ("tool/calls_mean", "tool/resumed_frac", "tool/error_frac", "rollout/length_mean")
            found[f"{policy}_{how}"] = row | {key: None if how == "without_tools" else 0.9 for key in keys}
    found["grpo_eval"] |= changed  # type: ignore[arg-type]
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("plan", [FULL, SHORT], ids=["full", "short"])
def test_every_command_is_a_valid_run_of_two_ranks(plan: Plan) -> None:
    found = dict(commands(plan, OUT))
    assert list(found)[: len(STAGES)] == list(STAGES)
    for name, arguments in found.items():
        config = load(shlex.split(arguments)).config
        assert config.output_dir == f"{OUT}/{name}" and violations(config, world_size=2) == []
        if name.endswith("without_tools"):
            with_tools = found[name.replace("without_tools", "eval")]
            assert arguments.split(" rl.use_tools=false")[0] == with_tools.rsplit(" output_dir=", 1)[0]
    for name, arguments in trace_commands(plan, OUT):
        given = traces.parse(shlex.split(arguments))
        assert given.out == OUT / name and given.heldout == load(["+stage=sft"]).config.data.heldout


def test_a_gap_or_a_gain_that_is_not_there_is_told() -> None:
    assert check(rows(), FULL) == []
    assert len(check(rows(search=0.2), FULL)) == 1 and "search" in check(rows(search=0.2), FULL)[0]
    assert "GRPO adds" in check(rows(accuracy=0.41), FULL)[0]
    assert check(rows(**{"tool/resumed_frac": None}), FULL) == [], "nobody called a tool"


def test_the_table_has_a_line_for_each_policy_and_way() -> None:
    lines = table(rows(), FULL).splitlines()
    assert len(lines) == 1 + 2 * len(MEASURED) and len({len(line) for line in lines}) == 1
    assert "-" in lines[2], "no call without tools"
