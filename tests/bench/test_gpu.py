"""The GPU benchmark's whole plan at tiny sizes in Triton's interpreter: rows, checks, budget, what a failure does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tests.model.ops.interpreter  # noqa: F401  (repairs bf16 in the interpreter)
from bench.registry import provenance

from bench import gpu  # isort: skip

PLAN = gpu.Plan(
    device="cpu",
    geometry=gpu.Geometry(
        heads=2, nope=8, rope=8, latent=16, value=8, index_heads=2, index_dim=16, topk=4
    ),
    lengths=(12,),
    check_length=12,
    check_topk=4,
    workspace=1 << 20,
    repeats=1,
    check_repeats=3,
    kernel_tests=False,
    linears=((20, 130, 40),),
    experts=(3, 24, 16, 8),
)  # fmt: skip


def result(folder: Path) -> dict:
    return json.loads((folder / "gpu.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bool, dict]:
    folder = tmp_path_factory.mktemp("gpu")
    return gpu.run(PLAN, folder / "gpu.json"), result(folder)


def test_every_kernel_is_checked_and_timed(whole: tuple[bool, dict]) -> None:
    passed, found = whole
    assert passed and found["passed"], [row for row in found["rows"] if "error" in row or row.get("ok") is False]
    assert not any("skipped" in row for row in found["rows"])
    checks = [row for row in found["rows"] if row["name"].startswith("check")]
    assert found["running"] is None and len(checks) == 8 and all(row["ok"] for row in checks)
    assert [row["repeats_equal"] for row in checks if row.get("deterministic")] == [True]
    timed = {row["name"] for row in found["rows"] if "ms" in row}
    assert timed == {
        "index_topk", "index_topk fp8", "sparse_mla forward", "sparse_mla forward with target", "sparse_mla backward",
        "sparse_mla backward, deterministic", "index_kl_selected", "dense forward, SDPA default",
        "dense backward, SDPA default", "mla_dense forward, Triton", "index_kl_dense",
        *(f"{name}, forward and backward" for name in (
            "linear fp8", "linear bf16", "experts grouped", "experts loop", "experts fp8",
        )),
    }  # fmt: skip
    ms = {row["name"]: row.get("ms") for row in found["rows"]}
    (step,) = (row for row in found["rows"] if row["name"].startswith("attention of"))
    parts = ("index_topk", "sparse_mla forward with target", "sparse_mla backward", "index_kl_selected")
    assert step["sparse_ms"] == pytest.approx(sum(ms[name] for name in parts), abs=0.01)
    assert step["dense_ms"] > 0
    assert {"commit", "device", "torch"} <= found.keys()


def test_a_failing_kernel_is_recorded_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(gpu, "sparse_mla", broken)
    assert gpu.run(replace(PLAN, repeats=1), tmp_path / "gpu.json") is False
    rows = {row["name"]: row for row in result(tmp_path)["rows"]}
    assert rows["check sparse layer"]["error"] == "RuntimeError: no such instruction"
    assert "ms" in rows["index_topk"] and "ms" in rows["index_kl_dense"] and rows["check warm-up"]["ok"]
    assert "sparse_mla backward" in rows["attention of a training step"]["missing"]


def test_a_wrong_kernel_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu.index_kl_dense

    def wrong(*arguments: object, settings: gpu.OpSettings, **options: object):
        out, found = real(*arguments, settings=settings, **options)
        return (out * 1.1 if settings.backend == "triton" else out), found

    monkeypatch.setattr(gpu, "index_kl_dense", wrong)
    found = gpu.check_warm_up(PLAN)
    assert not found["ok"] and found["errors"]["out"] > 0.09


def test_what_does_not_fit_the_time_is_skipped(tmp_path: Path) -> None:
    assert gpu.run(replace(PLAN, budget_s=0.0), tmp_path / "gpu.json")
    rows = result(tmp_path)["rows"]
    assert len(rows) > 5 and all(row["skipped"] == "time budget" for row in rows)


def test_flops_by_counting() -> None:
    g, length = PLAN.geometry, 9
    pairs = [(t, s) for t in range(length) for s in range(t + 1)]
    chosen = [(t, s) for t, s in pairs if s < g.topk]  # any topk of them: their number counts
    assert (gpu.visible(length), gpu.selected(length, g.topk)) == (len(pairs), len(chosen))
    found = gpu.flops(g, length)
    width = g.latent + g.rope
    assert found["sparse_forward"] == sum(2 * g.heads * (width + g.latent) for _ in chosen)
    assert found["sparse_backward"] == sum(2 * g.heads * (3 * width + 2 * g.latent) for _ in chosen)
    assert found["dense_forward"] == sum(2 * g.heads * (g.nope + g.rope + g.value) for _ in pairs)


def test_without_a_gpu_it_says_so() -> None:
    import subprocess
    import sys

    ended = subprocess.run([sys.executable, "-m", "bench.gpu"], capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "this machine has none: run it on one with CUDA" in ended.stderr


def test_a_baseline_that_a_gpu_does_not_offer_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*arguments: object, **options: object) -> None:
        raise RuntimeError("No available kernel")

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", unavailable)
    assert gpu.run(PLAN, tmp_path / "gpu.json")
    rows = {row["name"]: row for row in result(tmp_path)["rows"]}
    assert rows["dense forward, SDPA default"]["error"] == "RuntimeError: No available kernel"
    assert {"forward", "backward"} <= set(rows["attention of a training step"]["missing"])


def test_a_crash_leaves_the_name_of_what_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*arguments: object, **options: object) -> None:
        raise SystemExit(139)

    monkeypatch.setattr(gpu, "check_warm_up", crash)
    with pytest.raises(SystemExit):
        gpu.run(PLAN, tmp_path / "gpu.json")
    found = result(tmp_path)
    assert found["running"] == "check warm-up" and not found["passed"] and len(found["rows"]) == 2


def test_an_error_of_small_entries_is_seen() -> None:
    """Half of the entries are lost, all small beside the largest one."""
    expected = {"d": torch.ones(1000)}
    expected["d"][0] = 100.0
    mine = {"d": expected["d"].clone()}
    mine["d"][500:] = 0.0
    assert not gpu.errors(mine, expected)["ok"]
    assert gpu.errors(expected, expected) == {"errors": {"d": 0.0}, "ok": True, "bound": gpu.MAX_ERROR}


def test_git_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance()["commit"] == "unknown"
    monkeypatch.setenv("WINNOW_COMMIT", "abc123")
    assert provenance()["commit"] == "abc123"
