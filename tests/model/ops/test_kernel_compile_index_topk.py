"""The top-k kernel compiled for Hopper at V3.2's geometry (64 heads of 128, k = 2048), without a GPU."""

import pytest
import torch

from tests.model.ops.compile_sm90 import reports

pytest.importorskip("triton", reason="the kernels need triton")

HEADS, DIM, TOPK = 64, 128, 2048


def launches() -> None:
    from model.ops.index_topk.kernel import topk

    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        q = torch.empty((512, HEADS, DIM), dtype=dtype, device="meta")
        k = torch.empty((4096, DIM), dtype=dtype, device="meta")
        w = torch.empty((512, HEADS), device="meta")
        rows = torch.empty(512, dtype=torch.int32, device="meta")
        k_scale = torch.empty(4096, device="meta") if dtype == torch.float8_e4m3fn else None
        topk(q, k, w, rows, rows, TOPK, k_scale)


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return reports(__name__)


def test_fits_hopper(compiled):
    """Two programs a multiprocessor (one scores while the other selects), products on wgmma, keys fetched ahead."""
    assert len(compiled) == 2
    for kernel in compiled:
        assert kernel["shared"] <= 227 * 1024 // 2, kernel
        assert kernel["registers"] * 32 * kernel["warps"] <= 32768 and kernel["spilled"] <= 256, kernel
        assert kernel["wgmma"] > 0 and kernel["mma"] == 0 and not kernel["serialized"], kernel
        assert kernel["cp_async"] > 0, kernel
