"""The warm-up kernels compiled for Hopper at V3.2's geometry (64 x 128 indexer, 128 heads of 192), without a GPU."""

import pytest
import torch

from tests.model.ops.compile_sm90 import reports

pytest.importorskip("triton", reason="the kernels need triton")

ROWS, KEYS = 512, 8192


def launches() -> None:
    from model.ops.index_kl_dense.kernel import backward, scores, target

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, w = meta(ROWS, 64, 128), meta(KEYS, 128), meta(ROWS, 64, dtype=torch.float32)
    rows = meta(ROWS, dtype=torch.int32)
    scores(q, k, w, rows, rows, 0, KEYS)
    target(meta(ROWS, 128, 192), meta(KEYS, 128, 192), meta(ROWS, 128, dtype=torch.float32), 0.1, rows, rows, 0, KEYS)
    d_scores, d_k = meta(ROWS, KEYS, dtype=torch.float32), meta(KEYS, 128, dtype=torch.float32)
    backward(q, k, w, d_scores, 0, d_k)


def test_fits_hopper():
    """Every product on wgmma, tiles fetched ahead, nothing spilled."""
    kernels = reports(__name__)
    assert len(kernels) == 4
    for kernel in kernels:
        assert kernel["shared"] <= 227 * 1024 and kernel["spilled"] == 0, kernel
        assert kernel["wgmma"] > 0 and kernel["mma"] == 0 and kernel["cp_async"] > 0, kernel
