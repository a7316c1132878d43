"""The cost curve: what it predicts is consistent, what is committed is what the code says, and the page shows it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from bench.cost_curve import (
    LAST,
    POSITIONS,
    cpu,
    first_position,
    kernels,
    observed,
    predicted,
    scenarios,
    seconds,
    v3_2,
    verdict,
)
from bench.registry import RESULTS
from conf.hardware import load_cluster
from launch.cost_curve import main, page
from tests.launch.html_page import Page
from train.roofline import PHASES

MODEL, H800 = v3_2(), load_cluster("h800")


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads((RESULTS / "cost_curve.json").read_text())


def test_what_is_committed_is_what_the_code_predicts(committed: dict[str, Any]) -> None:
    assert committed["rows"] == [predicted(MODEL, H800, phase, position) for phase in PHASES for position in POSITIONS]
    assert committed["scenarios"] == json.loads(json.dumps(scenarios(MODEL, H800)))
    gpu = json.loads((RESULTS / "gpu.json").read_text())
    assert committed["h100_rows"] == kernels(MODEL, H800, gpu["rows"]) and committed["h100"]["commit"] == gpu["commit"]
    assert committed["verdict"] == verdict(committed) and committed["passed"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_dense_token_gets_dearer_with_its_position_and_a_sparse_one_less_so(phase: str) -> None:
    rows = [predicted(MODEL, H800, phase, position) for position in POSITIONS]
    for kind in ("dense", "sparse"):
        dollars = [row[kind]["dollars"] for row in rows]
        assert dollars == sorted(dollars)
    ratios = [row["sparse_over_dense"] for row in rows if row["position"] >= 8192]
    assert ratios == sorted(ratios, reverse=True)


@pytest.mark.parametrize("phase", PHASES)
def test_the_position_of_a_ratio_is_the_first_one(phase: str) -> None:
    for ratio in (1.0, 0.5):
        at = first_position(MODEL, H800, phase, ratio)
        ratios = [
            seconds(MODEL, H800, "sparse", phase, t) / seconds(MODEL, H800, "dense", phase, t) for t in (at - 1, at)
        ]
        assert ratios[0] > ratio >= ratios[1]


def test_deepseeks_own_throughput_in_dollars() -> None:
    """By hand: 14,800 tokens/s of 8 GPUs at $2 are $0.3003 a million; 43.75% of 73,700 are 32,243/s, $0.1378."""
    found = observed(MODEL, H800)
    assert found["decode"]["observed"] == pytest.approx(0.3003, abs=1e-4)
    assert found["prefill"]["observed"] == pytest.approx(0.1378, abs=1e-4)
    assert all(row["above"] > 0 for row in found.values()), "reality below the roofline: a rate is too low"


def test_assumptions_move_what_they_should() -> None:
    stated, slow_indexer, ours, full, real = scenarios(MODEL, H800)
    assert stated["decode"]["dense"] == pytest.approx(
        predicted(MODEL, H800, "decode", LAST)["dense"]["dollars"], abs=1e-3
    )
    assert slow_indexer["prefill"]["sparse"] > stated["prefill"]["sparse"]
    assert slow_indexer["decode"] == stated["decode"], "decode waits for the index keys, not for products"
    assert ours["prefill"]["ratio"] > stated["prefill"]["ratio"] and full["prefill"] == stated["prefill"]
    assert full["decode"]["ratio"] > stated["decode"]["ratio"]
    for kind in ("dense", "sparse"):
        added = real["decode"][kind] - stated["decode"][kind]
        assert added == pytest.approx(observed(MODEL, H800)["decode"]["above"], abs=2e-3)


def test_kernel_times_are_per_token_and_add_up() -> None:
    rows = [
        {"name": "dense forward, SDPA cudnn", "T": 1000, "ms": 2.0},
        {"name": "index_topk fp8", "T": 1000, "ms": 3.0},
        {"name": "sparse_mla forward", "T": 1000, "ms": 4.0},
        {"name": "check", "ok": True},
    ]
    (row,) = kernels(MODEL, H800, rows)
    assert (row["T"], row["dense"], row["sparse"]) == (1000, 2.0, 7.0)
    pairs = 2 * 128 * (192 + 128) * 500  # at the middle of the sequence, FLOPs of one layer
    assert row["dense_roofline"] == pytest.approx(pairs / (989e12 * 0.6) * 1e6, rel=0.01)


def test_the_small_model_is_measured_at_every_position() -> None:
    rows = cpu((64, 128, 512))
    assert [(row["phase"], row["position"]) for row in rows] == [
        ("prefill", 96), ("prefill", 320), ("decode", 64), ("decode", 128), ("decode", 512),
    ]  # fmt: skip
    assert all(row["dense"] > 0 and row["sparse"] > 0 for row in rows[2:])


def test_the_page_shows_every_panel_with_units_and_loads_nothing(committed: dict[str, Any]) -> None:
    source = page(committed)
    found = Page(source)
    assert not found.unbalanced and found.count("svg") == 6 and found.count("script") == 0
    assert "prefers-color-scheme: dark" in source and not re.search(r"(?:src|href)=|url\(", source)
    for unit in ("$ per million tokens", "CPU milliseconds per token", "GPU microseconds per token", "K tokens"):
        assert unit in source
    last = committed["rows"][-1]
    assert f"${last['sparse']['dollars']:.2f}</text>" in source and "nan" not in source.lower()


def test_a_result_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--result", "/nowhere.json"])
    assert "--result /nowhere.json is no file: python -m bench cost_curve writes one" in capsys.readouterr().err
