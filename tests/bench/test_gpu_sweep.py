"""The sweep's cases at tiny sizes in Triton's interpreter: other forms agree with the kernels, failures are rows."""

from __future__ import annotations

import pytest
import torch

import tests.model.ops.interpreter  # noqa: F401  (repairs narrow types in the interpreter)

from bench import gpu_cases, gpu_sweep  # isort: skip

SIZES = gpu_cases.Sizes(
    length=40, heads=16, latent=64, rope=16, query=24, value=16, index_heads=4, index_dim=32, topk=32, linear=(130, 140)
)
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")


@pytest.fixture(scope="module")
def world() -> gpu_cases.World:
    return gpu_cases.World("cpu", SIZES)


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_forms_agree(world: gpu_cases.World, part: str) -> None:
    """Every case of a part runs and gives what the first gives; what is compared is more than zeros."""
    assert (world.idx < 0).any() and (world.idx >= 0).all(1).any()
    rows: list[dict] = []
    errors: list[str | None] = [None] * len(gpu_cases.cases(world, (part,)))
    gpu_sweep.sweep(world, (part,), errors, lambda: 1.0, rows.append, clock=lambda run: 1.0)
    assert len(rows) == len(errors) and not any("error" in row for row in rows), rows
    compared = [row for row in rows if "ok" in row]
    assert len(compared) >= 4 and all(row["ok"] for row in compared), rows
    assert any(row["distance"] > 0 for row in compared)


def test_every_case_has_its_row(world: gpu_cases.World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is right, wrong, broken, not compiled, and too late; the first case of a part is what others are held to."""
    one, results = torch.ones(3), iter(range(100))

    def broken() -> gpu_cases.Results:
        raise RuntimeError("out of shared memory")

    def some(w: gpu_cases.World):
        yield gpu_cases.Case("a", "default", lambda: (one,), flops=10**9)
        yield gpu_cases.Case("a", "wrong", lambda: (one * 1.1,))
        yield gpu_cases.Case("a", "broken", broken)
        yield gpu_cases.Case("a", "not compiled", broken)
        yield gpu_cases.Case("b", "default", lambda: (2 * one,))
        yield gpu_cases.Case("b", "same", lambda: (2 * one,))
        yield gpu_cases.Case("b", "late", lambda: (one,))

    monkeypatch.setitem(gpu_cases.PARTS, "some", some)
    rows: list[dict] = []
    errors = [None, None, None, "no such layout", None, None, None]
    gpu_sweep.sweep(world, ("some",), errors, lambda: 6 - next(results), rows.append, clock=lambda run: 0.5)
    assert rows[0]["ms"] == 0.5 and rows[0]["tflops"] == 2.0 and "ok" not in rows[0]
    assert not rows[1]["ok"] and rows[1]["distance"] == pytest.approx(0.1, abs=0.01)
    assert rows[2]["error"] == "RuntimeError: out of shared memory" and rows[3]["error"] == "no such layout"
    assert "ms" in rows[4] and rows[5]["ok"] and rows[6]["skipped"] == "time"


@pytest.mark.parametrize("part", gpu_cases.PARTS)
def test_cases_are_named_apart(world: gpu_cases.World, part: str) -> None:
    names = [(case.part, case.config) for case in gpu_cases.cases(world, (part,))]
    assert len(names) == len(set(names)) > 1
