"""The demo's command lines are valid, and its promises are checked against the numbers."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from conf.load import load
from conf.validate import violations
from launch.demo import FULL, ROWS, SHORT, Plan, check, commands, table

GOOD = {
    name: {
        "loss/lm_dense": 2.7 if name in ("base", "warmup") else 2.6,
        "loss/lm_sparse": 2.61,
        "indexer/kl_captured": 0.93,
        "indexer/mass_recall": 0.86,
        "indexer/recall_of_oracle": 0.99,
        "indexer/recall_of_oracle_min": 0.98,
        "reward/accuracy": 0.9 if name == "grpo" else 0.4,
        "perf/tokens_per_s": 5000.0,
        "perf/peak_memory_bytes": 600.0 * 2**20,
    }
    for name in ROWS
}


@pytest.mark.parametrize("plan", [FULL, SHORT], ids=["full", "short"])
def test_every_command_is_a_valid_run_of_two_ranks(plan: Plan) -> None:
    found = commands(plan, Path("runs/demo"))
    assert [name for name, _ in found] == [n for row in ROWS for n in (row, f"{row}_eval")]
    for name, arguments in found:
        config = load(shlex.split(arguments)).config
        assert config.output_dir == f"runs/demo/{name}"
        assert violations(config, world_size=2) == []
        assert config.data.seq_len >= 8 * config.model.index_topk or config.stage == "grpo"


def test_adaptation_and_its_control_see_the_same_tokens_at_the_same_rate() -> None:
    runs = {name: load(shlex.split(arguments)).config for name, arguments in commands(FULL, Path("runs/demo"))}
    control, adapted = runs["base_continued"], runs["adapted"]
    assert (control.data, control.train) == (adapted.data, adapted.train)
    assert control.optim.lr == adapted.optim.lr is not None


def test_promises_kept_and_each_one_broken(capsys: pytest.CaptureFixture[str]) -> None:
    assert check(GOOD, FULL) == []
    for row, key, value, words in [
        ("warmup", "loss/lm_dense", 2.7000001, "leaves the dense loss"),
        ("warmup", "indexer/kl_captured", 0.89, "captures the KL: 0.890"),
        ("warmup", "indexer/recall_of_oracle_min", 0.96, "recall of the oracle in every layer: 0.960"),
        ("adapted", "loss/lm_sparse", 2.63, "+1.15%"),
        ("grpo", "domain/words/accuracy", 0.41, "puts right, words: 2% (at least 30%), accuracy 0.400 to 0.410"),
    ]:
        broken = check(GOOD | {row: GOOD[row] | {key: value}}, FULL)
        assert len(broken) == 1 and words in broken[0]
        assert f"BROKEN  {broken[0]}" in capsys.readouterr().out


def test_every_domain_has_a_column() -> None:
    rows = {name: row | {"domain/words/accuracy": 0.25, "domain/words/reward": 1.0} for name, row in GOOD.items()}
    lines = [line.split() for line in table(rows).split("\n")]
    assert "accuracy words tokens/s" in " ".join(lines[0]) and all(line[7] == "0.250" for line in lines[1:])


def test_the_table_has_a_line_a_row_and_aligned_columns() -> None:
    lines = table(GOOD).split("\n")
    assert len(lines) == 1 + len(ROWS) and len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["base", "2.700", "2.610", "0.930", "0.860", "0.990", "0.400", "5000", "600"]
