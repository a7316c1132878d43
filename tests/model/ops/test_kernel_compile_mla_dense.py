"""The dense attention kernel compiled for Hopper at DeepSeek-V3.2's geometry (128 heads of 192/128), without a GPU."""

import pytest
import torch

from tests.model.ops.compile_sm90 import reports

pytest.importorskip("triton", reason="the kernels need triton")

ROWS, KEYS = 512, 8192


def launches() -> None:
    from model.ops.mla_dense.kernel import forward

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = meta(ROWS, dtype=torch.int32)
    forward(meta(ROWS, 128, 192), meta(KEYS, 128, 192), meta(KEYS, 128, 128), 0.1, rows, rows)


def test_fits_hopper():
    """Every product on wgmma, tiles fetched ahead, nothing spilled."""
    (kernel,) = reports(__name__)
    assert kernel["shared"] <= 227 * 1024 and kernel["spilled"] == 0, kernel
    assert kernel["wgmma"] > 0 and kernel["mma"] == 0 and kernel["cp_async"] > 0, kernel
