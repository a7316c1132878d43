"""The parity table's statistics against numbers worked out by hand, and what it compares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.errors import UserError
from conf.load import load, save_yaml
from launch.parity import (
    by_position,
    cells,
    compare,
    compared,
    numbers,
    paired,
    read_pairs,
    verdict,
    write_parity,
)
from launch.recipe import Parity, Run
from train.intervals import t_quantile


@pytest.mark.parametrize(
    ("freedom", "printed"),  # a printed table of Student's t, two-sided 95%
    [(1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (11, 2.201), (15, 2.131), (30, 2.042), (120, 1.980)],
)
def test_quantiles_equal_a_printed_table(freedom: int, printed: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(printed, abs=6e-4)


def test_a_paired_difference_worked_out_by_hand() -> None:
    """Differences 0.1, 0.2, 0.3: mean 0.2, standard deviation 0.1, half width 4.3027 x 0.1 / sqrt(3) = 0.24842."""
    found = paired([1.0, 2.0, 5.0], [1.1, 2.2, 5.3])
    assert found["values"] == pytest.approx([0.1, 0.2, 0.3])
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((0.2, -0.04842, 0.44842), abs=1e-5)
    assert found["relative"] == pytest.approx(0.2 / (8 / 3)) and paired([0.0], [1.0])["relative"] is None


def test_what_both_runs_of_a_seed_share_drops_out() -> None:
    """Seeds far apart, differences alike: unpaired spread would hide this one."""
    found = paired([1.0, 3.0, 9.0], [1.010, 3.011, 9.009])
    assert 0 < found["low"] < 0.01 < found["high"] < 0.013


def test_one_seed_has_no_interval() -> None:
    found = paired([2.0], [2.5])
    assert (found["mean"], found["low"], found["high"]) == (0.5, None, None)
    assert verdict("loss/lm", found) == "one seed: no interval"


@pytest.mark.parametrize(
    ("metric", "low", "high", "said"),
    [
        ("loss/lm", 0.01, 0.02, "DSA worse"),
        ("loss/lm", -0.02, -0.01, "DSA better"),
        ("reward/accuracy", 0.01, 0.02, "DSA better"),
        ("reward/accuracy", -0.02, -0.01, "DSA worse"),
        ("loss/lm", -0.01, 0.01, "within noise"),
        ("loss/lm", 0.0, 0.01, "within noise"),
    ],
)
def test_a_verdict_knows_which_way_is_better(metric: str, low: float, high: float, said: str) -> None:
    assert verdict(metric, {"low": low, "high": high}) == said


def test_dense_is_held_against_sparse_and_accuracy_against_accuracy() -> None:
    control = {
        "loss/lm_dense": 2.0,
        "loss/lm_sparse": 9.0,
        "loss/mtp_dense": 3.0,
        "reward/accuracy": 0.4,
        "perf/x": 1.0,
    }
    sparse = {"loss/lm_dense": 1.9, "loss/lm_sparse": 2.1, "loss/mtp_dense": 3.1, "reward/accuracy": 0.5, "perf/x": 2.0}
    assert compared(control, sparse) == {
        "loss/lm": (2.0, 2.1),
        "loss/lm, DSA read densely": (2.0, 1.9),
        "reward/accuracy": (0.4, 0.5),
    }


def test_numbers_are_found_at_any_depth_and_nothing_else() -> None:
    given = {"a": 1, "b": {"c": 2.5, "d": None, "e": True, "f": float("nan")}, "g": [3], "h": "4"}
    assert numbers(given) == {"a": 1.0, "b/c": 2.5}


def test_losses_by_position_are_compared_bucket_by_bucket() -> None:
    def rows(*ends: int) -> dict:
        return {"loss_by_position": [{"from": 1, "to": end, "dense": 1.0 + end, "sparse": 2.0 + end} for end in ends]}

    assert by_position(rows(16, 64), rows(16, 32)) == {"loss/lm, 1 to 16 tokens of context": (17.0, 18.0)}
    (row,) = compare({1: (rows(16), rows(16)), 2: (rows(16), rows(16))})
    assert row["difference"]["mean"] == 1.0 and row["verdict"] == "DSA worse"


def evaluations(folder: Path, missing: tuple[str, ...] = (), topk: int = 512) -> list[Run]:
    runs = []
    config = load(["+stage=evaluate", f"model.index_topk={topk}", "data.seq_len=512"]).config
    for seed, shared in ((1, 0.0), (2, 0.5), (3, 1.0)):
        for step, extra in (("dense_eval", 0.0), ("dsa_eval", 0.01 * seed)):
            run = Run(f"{step}_seed{seed}", step, "evaluate", folder / f"{step}_seed{seed}", 1, seed)
            run.folder.mkdir()
            save_yaml(config, run.folder / "config.yaml")
            row = {"loss/lm_dense": 2.0 + shared, "loss/lm_sparse": 2.0 + shared + extra, "reward/accuracy": 0.5}
            (run.folder / "evaluation.json").write_text(json.dumps({k: v for k, v in row.items() if k not in missing}))
            runs.append(run)
    return runs


def test_files_hold_the_rows_and_the_page_escapes_nothing_less(tmp_path: Path) -> None:
    runs, names = evaluations(tmp_path), Parity("dense_eval", "dsa_eval")
    assert list(read_pairs(names, runs)) == [1, 2, 3]
    shown = write_parity(names, runs, tmp_path)
    (lm, *_) = json.loads((tmp_path / "parity.json").read_text())["rows"]
    assert lm["metric"] == "loss/lm" and lm["control"]["mean"] == pytest.approx(2.5)
    assert lm["control"]["sd"] == pytest.approx(0.5) and lm["difference"]["mean"] == pytest.approx(0.02)
    line = next(line for line in shown.splitlines() if line.startswith("loss/lm "))
    assert (
        line.split()
        == "loss/lm 2.5000 ± 0.5000 2.5200 ± 0.5100 +0.0200 (+0.80%) -0.0048 to +0.0448 within noise".split()
    )
    assert f"| {' | '.join(cells(lm))} |" in (tmp_path / "parity.md").read_text()
    page = (tmp_path / "parity.html").read_text()
    assert "within noise" in page and "default-src 'none'" in page


def test_accuracies_of_a_control_that_answered_through_its_untrained_indexer_are_left_out(tmp_path: Path) -> None:
    shown = write_parity(Parity("dense_eval", "dsa_eval"), evaluations(tmp_path, topk=64), tmp_path)
    assert "accuracy " not in shown and "the control answered with 64 keys of an untrained indexer" in shown
    assert "loss/lm " in shown


def test_a_metric_that_a_seed_lacks_is_left_out_and_none_at_all_is_told(tmp_path: Path) -> None:
    full, bare = {"loss/lm_dense": 1.0, "loss/lm_sparse": 1.0, "reward/accuracy": 1.0}, {"reward/accuracy": 1.0}
    assert [row["metric"] for row in compare({1: (full, full), 2: (full, bare)})] == ["reward/accuracy"]
    runs = evaluations(tmp_path, missing=("loss/lm_dense", "reward/accuracy"))
    with pytest.raises(UserError, match="have no metric in common"):
        write_parity(Parity("dense_eval", "dsa_eval"), runs, tmp_path)
