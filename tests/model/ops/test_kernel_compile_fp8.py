"""The FP8 operand kernels compiled for Hopper at DeepSeek-V3.2's widths: they move memory, so nothing is spilled, and
e4m3 is made by the hardware's own conversion."""

import pytest
import torch

from tests.model.ops.compile_sm90 import reports

pytest.importorskip("triton", reason="the kernels need triton")
KERNELS = ["_activations"] * 4 + ["_weights"] * 2 + ["_rotate_and_quantise"]
SMALL = ["_activations", "_weights"] * 2 + ["_rotate_and_quantise"]  # of a single row and of a single column


def launches() -> None:
    from model.ops.fp8_linear import kernel
    from model.ops.index_topk import fp8_kernel

    x = torch.empty(512, 7168, dtype=torch.bfloat16)
    for counts, power_of_two in (([512], True), ([512], False), ([300, 0, 212], True)):
        kernel.activations(x, counts, power_of_two, by_rows=True, by_columns=True)
    kernel.activations(x, [512], True, by_rows=True)
    for transposed in (False, True):
        kernel.weights(torch.empty(2, 2048, 7168), True, transposed)
    fp8_kernel.rotate_and_quantise(torch.empty(512, 64, 128, dtype=torch.bfloat16))
    for shape in ((1, 129), (129, 1)):
        kernel.activations(torch.empty(shape), [shape[0]], True, by_rows=True, by_columns=True)
        kernel.weights(torch.empty(2, *shape), True)
    fp8_kernel.rotate_and_quantise(torch.empty(1, 128))


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return reports(__name__)


def test_fits_hopper(found):
    """At least two programs a multiprocessor, so that one reads while another rounds."""
    assert [report["name"] for report in found] == KERNELS + SMALL
    for report in found[: len(KERNELS)]:
        assert report["spilled"] == 0 and report["shared"] <= 227 * 1024 // 2, report
        assert report["registers"] * 32 * report["warps"] <= 32768, report
        assert report["e4m3"] > 0, report


def test_the_transform_stays_in_its_warps(found):
    assert found[len(KERNELS) - 1]["shared"] <= 1024, found[len(KERNELS) - 1]


def test_every_pair_of_e4m3_has_its_partner(found):
    """ptxas 12.8 takes two pairs of the same constant (padding, where it is known to be) for one and puts it beside
    whatever the register held, such as a loaded number."""
    assert any(report["merged_with"] for report in found)
    for report in found:
        assert report["merged_with"].keys() <= {"F2FP"}, report
