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


def launches(dtype: torch.dtype = torch.bfloat16) -> None:
    from model.ops.sparse_mla import kernel

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


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return reports(__name__)


def test_resources(found):
    assert [report["name"] for report in found] == KERNELS
    for report in found:
        assert report["shared"] <= 227 * 1024, report
        assert report["spilled"] == 0 and not report["serialized"], report


def test_products_run_on_warpgroups_and_gathers_are_asynchronous(found):
    for report in found[:-1]:
        assert report["wgmma"] > 0 and report["mma"] == 0, report
        assert report["cp_async"] > 0, report


def test_no_product_is_computed_twice(found):
    """A warpgroup's instruction is 64 x n x 16. Where the warpgroups share the work, so many stand in a loop's body:

    forward: 36 steps along the row for the scores (32 columns of the 64 keys a warpgroup), 4 along the keys for the
    output; gradients: 4 for dq (64 keys), 8 each for dS^T q and P^T dO (128 heads). Twice as many mean the same twice.
    """
    by_name = {report["name"]: report["wgmma"] for report in reversed(found)}
    assert by_name["_forward"] == 36 + 4
    assert by_name["_backward_gradients"] == 4 + 8 + 8


def test_atomics_add_four_floats(found):
    """And only the fast mode has them."""
    for report in found[:5]:
        expected = {"atom.global.gpu.relaxed.add.v4.f32"} if report["name"] == "_backward_gradients" else set()
        assert set(report["atomic"]) == expected, report
    assert not any(report["atomic"] for report in found[5:])
