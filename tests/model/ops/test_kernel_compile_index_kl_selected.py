"""The kernels of index_kl_selected compiled for Hopper at DeepSeek-V3.2's geometry: resources and instructions."""

import pytest
import torch

from tests.model.ops.compile_sm90 import reports

pytest.importorskip("triton")


def launches(dtype: torch.dtype = torch.bfloat16) -> None:
    from model.ops.index_kl_selected import kernel

    rows, keys, heads, width, k = 8, 4096, 64, 128, 2048
    inputs = (
        torch.empty(rows, heads, width, dtype=dtype),
        torch.empty(keys, width, dtype=dtype),
        torch.empty(rows, heads),
    )
    idx = torch.empty(rows, k, dtype=torch.int32)
    kernel.scores(*inputs, idx)
    for deterministic in (False, True):
        kernel.backward(*inputs, idx, torch.empty(rows, k), torch.empty(keys, width), deterministic=deterministic)


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return reports(__name__)


def test_resources(found):
    assert [report["name"] for report in found] == ["_scores", "_backward", "_backward", "_segment_sum"]
    for report in found:
        assert report["shared"] <= 113 * 1024, (
            report
        )  # two programs share a multiprocessor: one gathers, one multiplies
        assert report["spilled"] <= 16 and not report["serialized"], report  # 4 registers a thread, by Triton's version


def test_instructions(found):
    scores, fast, ordered, _ = found
    for report in (scores, fast, ordered):
        assert report["wgmma"] > 0 and report["mma"] == 0 and report["cp_async"] > 0, report
    assert fast["atomic"] == ["atom.global.gpu.relaxed.add.v4.f32"]
    assert scores["atomic"] == ordered["atomic"] == []
