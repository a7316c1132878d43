"""The sweep's cases at tiny sizes in Triton's interpreter: other forms agree with the kernels, failures are rows."""

from __future__ import annotations

import pytest
import torch

import tests.model.ops.interpreter  # noqa: F401  (repairs narrow types in the interpreter)

from bench import gpu_cases, gpu_sweep  # isort: skip
from bench import gpu_variants_kernel as gpu_variants  # isort: skip

SIZES = gpu_cases.Sizes(
    length=40, heads=16, latent=64, rope=16, query=24, value=16, index_heads=4, index_dim=32, topk=32, linear=(130, 140)
)
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")


@pytest.fixture(scope="module")
def world() -> gpu_cases.World:
    return gpu_cases.World("cpu", SIZES)


def test_written_p_is_the_kernels_forward_and_target(world: gpu_cases.World) -> None:
    w, kernel = world, gpu_cases.sparse
    out, lse = kernel.forward(w.q, w.kv, w.idx, w.scale, 64)
    target = kernel.target(w.q, w.kv, w.idx, lse, w.scale)
    assert (w.idx < 0).any() and (w.idx >= 0).all(1).any()
    for registers in (0, 3):
        p, top, found = gpu_variants.scores(w.q, w.kv, w.idx, w.scale, 64, 32, registers, 4, 1)
        values, mean = gpu_variants.values(w.kv, w.idx, p, top, found, 64, True, 32, 4, 1)
        assert gpu_sweep.distance((values, found, mean), (out, lse, target)) < 2**-7


def test_parted_gradients_are_the_kernels(world: gpu_cases.World) -> None:
    w, kernel = world, gpu_cases.sparse
    out, lse = w.attended
    before = torch.randn(40, 80)
    d_kv = before.clone()
    d_q = kernel.backward(w.q, w.kv, w.idx, out, lse, w.d_out, w.scale, d_kv)
    p = gpu_variants.probabilities(w.q, w.kv, w.idx, lse, w.scale, 64, 16, 3, 4, 1)
    ds = gpu_variants.score_gradients(w.d_out, w.kv, w.idx, p, out, w.scale, 16, 3, 4, 1)
    assert gpu_sweep.distance((gpu_variants.query_gradients(w.kv, w.idx, ds, 64, 16, 32, 4, 1),), (d_q,)) < 2**-6
    for registers in (0, 2):
        found = before.clone()
        gpu_variants.key_gradients(w.q, w.idx, w.d_out, p, ds, found, 16, 32, registers, 4, 1)
        assert gpu_sweep.distance((found - before,), (d_kv - before,)) < 2**-6
    gpu_variants.key_gradients(w.q, w.idx, w.d_out, p, ds, found, 16, 32, 0, 4, 1, add=False)
    assert gpu_sweep.distance((found - before,), (d_kv - before,)) < 2**-6


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
