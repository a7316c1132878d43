"""The kernels of sparse_mla compiled for Hopper at DeepSeek-V3.2's geometry: resources and instructions."""

import pytest
import torch

from tests.model.ops.compile_sm90 import reports

pytest.importorskip("triton")
SCALE = 0.1
KERNELS = [
    "_forward",
    "_target",
    *["_backward_scores", "_backward_gradients", "_backward_gradients"] * 2,
    "_segment_sum",
]
BACKWARD = ["_products", "_products", "_weighted", "_weighted", "_columns", "_columns"]
WRITTEN = ["_products", "_weighted", *BACKWARD, *BACKWARD, "_segment_sum"]


def launches(dtype: torch.dtype = torch.bfloat16) -> None:
    from model.ops.sparse_mla import kernel, written_kernel

    rows, keys, heads, value_dim, width, k = 8, 4096, 128, 512, 576, 2048
    q, kv = torch.empty(rows, heads, width, dtype=dtype), torch.empty(keys, width, dtype=dtype)
    out, lse, d_kv = (
        torch.empty(rows, heads, value_dim, dtype=dtype),
        torch.empty(rows, heads),
        torch.empty(keys, width),
    )
    idx = torch.empty(rows, k, dtype=torch.int32)
    kernel.forward(q, kv, idx, SCALE, value_dim)
    kernel.target(q, kv, idx, lse, SCALE)
    for deterministic in (False, True):
        kernel.backward(q, kv, idx, out, lse, out, SCALE, d_kv, deterministic=deterministic)
    assert written_kernel.suits(q, kv, value_dim)
    written_kernel.forward(q, kv, idx, SCALE, value_dim)
    for deterministic in (False, True):
        written_kernel.backward(q, kv, idx, out, lse, out, SCALE, d_kv, deterministic=deterministic)


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return reports(__name__)


def test_resources(found):
    assert [report["name"] for report in found] == KERNELS + WRITTEN
    for report in found:
        assert report["shared"] <= 227 * 1024, report
        # of 255 registers a thread: the products that make dS hold most, and lose 20 of them outside the loop
        assert report["spilled"] <= (80 if report["name"] == "_products" else 0), report
        assert not report["serialized"], report


def test_products_run_on_warpgroups_and_gathers_are_asynchronous(found):
    for report in found:
        if report["name"] != "_segment_sum":
            assert report["wgmma"] > 0 and report["mma"] == 0, report
            assert report["cp_async"] > 0, report


def test_no_product_is_computed_twice(found):
    """A warpgroup's instruction is 64 x n x 16. Where the warpgroups share the work, so many stand in a loop's body:

    forward: 36 steps along the row for the scores (32 columns of the 64 keys a warpgroup), 4 along the keys for the
    output; gradients: 4 for dq (64 keys), 8 each for dS^T q and P^T dO (128 heads). Twice as many mean the same twice.
    Where P is written: 36 for S, 32 for dP and, before the loop, 8 for each of 3 chunks; 4 for the output and dq (64
    keys); 16 each for dS^T q and P^T dO (128 heads, twice 64 of the 256 columns a warpgroup) and 16 before the loop.
    """
    by_name: dict[str, set[int]] = {}
    for report in found:
        if report["warps"] == 8:  # the rope's narrow kernels run on one warpgroup
            by_name.setdefault(report["name"], set()).add(report["wgmma"])
    assert by_name["_forward"] == {36 + 4}
    assert 4 + 8 + 8 in by_name["_backward_gradients"]
    assert by_name["_products"] == {36 + 24, 32 + 24}
    assert by_name["_weighted"] == {4} and by_name["_columns"] == {16 + 16 + 16}


def test_atomics_add_four_floats(found):
    """And only the fast mode has them."""
    adding = {"atom.global.gpu.relaxed.add.v4.f32"}
    written, fast = len(KERNELS), 5
    for number, report in enumerate(found):
        is_fast = number < fast or written <= number < written + 2 + len(BACKWARD)
        expected = adding if is_fast and report["name"] in ("_backward_gradients", "_columns") else set()
        assert set(report["atomic"]) == expected, report
