"""The schedules' tables: whole, runnable, and as idle as the closed formulas say where these hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from conf.schema import ModelConfig
from conf.validate_pipeline import PARTS
from train.parallel.depth import cut_in_depth, parts_of_floor
from train.parallel.schedules import Action, bubble, formula, simulate, table, unit_cost


@pytest.mark.parametrize("schedule", PARTS)
@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 4), (4, 8), (8, 16)])
def test_every_pass_of_every_part_runs_once_on_its_floor(schedule: str, pp: int, micro_batches: int) -> None:
    ranks = table(schedule, pp, micro_batches)
    for floor, actions in enumerate(ranks):
        assert {action.part for action in actions} == set(parts_of_floor(schedule, pp, floor))
        runs = Counter((a.part, a.micro_batch, kind) for a in actions for kind in {"B": "IW"}.get(a.kind, a.kind))
        assert set(runs.values()) == {1}
        assert len(runs) == 3 * micro_batches * PARTS[schedule]


@pytest.mark.parametrize("schedule", PARTS)
@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("rounds", [2, 3, 5])
def test_table_is_as_idle_as_the_formula(schedule: str, pp: int, rounds: int) -> None:
    found = bubble(simulate(table(schedule, pp, rounds * pp), unit_cost))
    assert found == pytest.approx(formula(schedule, pp, rounds * pp), abs=1e-12)


def test_one_forward_one_backward_by_hand() -> None:
    """Two ranks, two micro-batches, F = 1, B = 2: rank 1 waits one for its first input, rank 0 two for each gradient
    but what its second forward fills: F0 F1 . B0 B0 . B1 B1 / . F0 B0 B0 F1 B1 B1."""
    first, second = simulate(table("1f1b", 2, 2), lambda action: 1.0 if action.kind == "F" else 2.0)
    assert [(str(each.action.kind), each.start, each.end) for each in first] == [
        ("F", 0, 1),
        ("F", 1, 2),
        ("B", 4, 6),
        ("B", 7, 9),
    ]
    assert [each.start for each in second] == [1, 2, 4, 5]
    assert bubble([first, second]) == pytest.approx(1 - 12 / 18)


def test_a_table_that_waits_for_itself_is_named() -> None:
    with pytest.raises(ValueError, match="waits for itself"):
        simulate([[Action("B", 0, 0), Action("F", 0, 0)]], unit_cost)


@pytest.mark.parametrize(
    ("layers", "mtp", "count", "sizes"),
    [
        (4, 0, 2, [2, 2]),
        (4, 1, 2, [3, 1]),
        (2, 1, 2, [1, 1]),
        (8, 1, 8, [1] * 8),
        (61, 1, 16, [4] * 14 + [3, 2]),  # 62 layers with MTP's, which stands with the last
        (5, 0, 4, [2, 1, 1, 1]),
    ],
)
def test_layers_are_cut_evenly_with_mtp_in_the_last_part(layers: int, mtp: int, count: int, sizes: list[int]) -> None:
    model = replace(ModelConfig(), num_hidden_layers=layers, num_nextn_predict_layers=mtp)
    parts = cut_in_depth(model, count)
    assert [len(part) for part in parts] == sizes
    assert [number for part in parts for number in part] == list(range(layers))
