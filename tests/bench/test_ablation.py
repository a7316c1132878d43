"""The cells of the ablation are runs that may start, and its table says what was not measured."""

from __future__ import annotations

import shlex

import pytest

from bench.ablation import CELLS, COLUMNS, CONTROL, POLICY, folder_name, table
from conf.load import load
from conf.validate import violations


@pytest.mark.parametrize("name", [*CELLS, CONTROL])
def test_a_cell_is_a_valid_command(name: str):
    line = f"+stage=grpo init_from=x {POLICY} {CELLS.get(name, '')} output_dir=/a/{folder_name(name)}_1"
    assert not violations(load(shlex.split(line)).config)


def test_a_run_without_a_reference_has_no_kl_rather_than_none_of_it():
    figures = {key: 0.5 for key, _ in COLUMNS.values()}
    rows = [{"off": "all on", **figures}, {"off": "without KL", **figures, "kl_ref": None}]
    first, second = table(rows).splitlines()[2:]
    assert "not measured" not in first and second.count("not measured") == 1
