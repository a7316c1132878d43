"""Alerts: each rule speaks of its trouble, once, and of nothing in the history of a healthy run."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.schema import AlertsConfig, TrackerConfig
from tests.launch.runs import write_run
from tests.train import runs
from train.alerts import FILE_NAME, RULES, Alert, AlertWriter, Watch, alerts
from train.metrics import read_metrics

CFG = AlertsConfig()
HEALTHY = json.loads((Path(__file__).parent / "healthy.json").read_text())  # of `python -m bench adapted`, 4 digits


def history(key: str, values: list[float | None]) -> list[dict[str, Any]]:
    return [{"step": 10 * (i + 1), key: value} for i, value in enumerate(values)]


def raised(key: str, values: list[float | None], cfg: AlertsConfig = CFG) -> list[tuple[str, int]]:
    return [(alert.rule, alert.step // 10) for alert in alerts(history(key, values), cfg)]


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [
        ("loss/lm", [2.0, 2.0, None, None, 2.0, None], [("not_finite", 3), ("not_finite", 6)]),
        ("optim/grad_norm", [None], [("not_finite", 1)]),
        ("tool/seconds_mean", [None, None], []),  # nobody called a tool
        ("policy/kl_ref", [0.01 * i for i in range(40)], [("kl_rising", 23)]),  # the median of 5 is at 0.2
        ("policy/kl_ref", [0.01] * 10 + [0.06] * 10, [("kl_rising", 13)]),  # 6 times the window before
        ("policy/kl_ref", [1e-6] * 10 + [1e-4] * 10, []),  # many times nothing
        ("policy/kl_ref", [0.01] * 10 + [5.0] + [0.01] * 10, []),  # one odd batch
        ("indexer/recall_of_oracle", [0.99] * 10 + [0.85] * 10, [("recall_falling", 15)]),
        ("indexer/recall_of_oracle", [0.99] * 10 + [0.93] * 10, []),
        ("indexer/recall_of_oracle", ([0.99] * 4 + [0.6]) * 6, []),  # a hard batch now and then
        ("indexer/kl_captured_selected", [0.8, 0.2] * 3 + [0.9] * 5 + [0.5] * 5, [("recall_falling", 16)]),
        ("mismatch/k3", [1e-4] * 5 + [2e-3] * 5, [("mismatch_growing", 8)]),  # 20 times the start
        ("mismatch/k3", [0.02] * 9, [("mismatch_growing", 5)]),  # too large from the start
        ("mismatch/k3", [1e-13] * 5 + [1e-10] * 9, []),  # a thousand times nothing
        ("rollout/truncated_frac", [0.1] * 5 + [0.5] * 9, [("rollouts_truncated", 8)]),
        ("optim/skipped_steps", [0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 2], [("steps_skipped", 3), ("steps_skipped", 10)]),
        ("optim/skipped_steps", [3], [("steps_skipped", 1)]),
        ("optim/skipped_steps", [0, 1, 2, 3, 4], [("steps_skipped", 2)]),
    ],
)
def test_each_rule_speaks_once_of_its_trouble(
    key: str, values: list[float | None], expected: list[tuple[str, int]]
) -> None:
    assert raised(key, values) == expected


def test_an_alert_comes_again_only_after_it_was_well_over() -> None:
    near = [0.31, 0.29] * 30  # around the limit: no clatter
    assert raised("rollout/truncated_frac", near) == [("rollouts_truncated", 5)]
    again = [0.5] * 9 + [0.1] * 9 + [0.5] * 9
    assert raised("rollout/truncated_frac", again) == [("rollouts_truncated", 5), ("rollouts_truncated", 21)]


def test_limits_are_the_configurations() -> None:
    values: list[float | None] = [0.2] * 9
    assert raised("rollout/truncated_frac", values, replace(CFG, truncated=0.1, window=2)) == [
        ("rollouts_truncated", 2)
    ]
    off = replace(CFG, kl_ref=0.0, recall_drop=0.0, mismatch_k3=0.0, truncated=0.0, skipped_steps=10**9)
    for key, trouble in [
        ("policy/kl_ref", [9.0]),
        ("indexer/recall_of_oracle", [0.9] * 9 + [0.1]),
        ("mismatch/k3", [9.0]),
        ("rollout/truncated_frac", [1.0]),
        ("optim/skipped_steps", [9.0]),
    ]:
        wrong = [*trouble, *trouble[-1:] * 9]
        assert raised(key, wrong) and raised(key, wrong, off) == [] == raised(key, wrong, replace(CFG, on=False))


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_brings_no_alert(name: str) -> None:
    columns = HEALTHY[name]
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    assert len(rows) > 20 and alerts(rows, CFG) == []


@pytest.mark.parametrize("stage", ["pretrain", "dense_warmup", "sparse_adapt", "grpo"])
def test_plausible_curves_bring_no_alert(tmp_path: Path, stage: str) -> None:
    for seed in range(5):
        rows, _ = read_metrics(write_run(tmp_path / str(seed), stage, steps=400, seed=seed) / "metrics.jsonl")
        assert alerts(rows, CFG) == []


def test_noise_brings_no_alert() -> None:
    noise = random.Random(0)
    for key, level in [("indexer/recall_of_oracle", 0.9), ("rollout/truncated_frac", 0.05), ("policy/kl_ref", 0.05)]:
        assert raised(key, [level * (1 + 0.03 * noise.gauss(0, 1)) for _ in range(2000)]) == []


def test_memory_does_not_grow_with_the_run() -> None:
    watch = Watch(CFG)
    for row in history("policy/kl_ref", [0.01] * 5000):
        watch.see(row)
    assert max(len(series.recent) for series in watch._series.values()) == 2 * CFG.window


def test_a_run_says_prints_and_resumes_its_alerts(tmp_path: Path) -> None:
    """The file is what the kept rows bring: alerts after the checkpoint are cut away with their rows."""
    rows = history("rollout/truncated_frac", [0.5] * 9 + [0.1] * 9 + [0.5] * 9)
    writer = AlertWriter(tmp_path, CFG)
    assert [len(writer.see(row)) for row in rows].count(1) == 2
    whole = (tmp_path / FILE_NAME).read_bytes()
    assert [json.loads(line)["step"] for line in whole.splitlines()] == [50, 210]
    resumed = AlertWriter(tmp_path, CFG, rows[:12])
    assert len((tmp_path / FILE_NAME).read_bytes().splitlines()) == 1
    for row in rows[12:]:
        resumed.see(row)
    assert (tmp_path / FILE_NAME).read_bytes() == whole
    AlertWriter(tmp_path, CFG)
    assert (tmp_path / FILE_NAME).read_bytes() == b""


def test_a_real_run_tells_its_tracker_and_its_log(tmp_path: Path) -> None:
    limit = TrackerConfig(name="none", alerts=replace(CFG, window=1, recall_drop=1e-9))
    run = replace(runs.config(tmp_path / "base", steps=2, save_every=2), tracker=limit)
    assert runs.go(run) == ["finished"] and not (tmp_path / "base" / FILE_NAME).exists()
    warm = runs.config(tmp_path / "warm", "dense_warmup", init_from=str(tmp_path / "base"), steps=12, save_every=12)
    assert runs.go(replace(warm, tracker=limit)) == ["finished"]
    found = [Alert(**json.loads(line)) for line in (tmp_path / "warm" / FILE_NAME).read_text().splitlines()]
    assert found and {alert.rule for alert in found} == {"recall_falling"}
    assert found == alerts(read_metrics(tmp_path / "warm/metrics.jsonl")[0], limit.alerts)


def test_every_rule_has_a_test() -> None:
    source = Path(__file__).read_text()
    assert all(f'("{name}", ' in source for name in RULES)
