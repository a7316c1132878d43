"""The kernels that make FP8 operands against torch's quantisation, bit for bit: values, scales, padding and layout."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.fp8_linear import op
from model.ops.index_topk.fp8 import hadamard, quantise
from tests.model.ops.interpreter import DEVICE, poison_allocations

from model.ops.fp8_linear.kernel import activations, weights  # isort: skip  (after the helper)
from model.ops.index_topk.fp8_kernel import rotate_and_quantise  # isort: skip

# ragged, whole tiles, less than one, a single row, column and number
SHAPES = [(259, 301), (128, 256), (7, 20), (1, 129), (129, 1), (1, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.filterwarnings("ignore:invalid value")  # numpy, of inf and NaN


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    poison_allocations(monkeypatch)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows and columns of unequal size, and whatever blocks may hold: zeros, subnormal and huge numbers, inf, NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    for axis in (-1, -2):
        x = x * torch.randn(shape[axis], generator=generator).exp().unsqueeze(-1 if axis == -2 else -2)
    if shape[-2] > 250:
        x[..., :130, :128], x[..., 5, 200], x[..., 9, 250], x[..., 140, 3] = 0.0, torch.nan, torch.inf, -torch.inf
        x[..., 200, :], x[..., 201, :], x[..., 202, :] = x[..., 200, :] * 1e-38, x[..., 201, :] * 1e-42, -0.0
        x[..., 203, 140:], x[..., 204, :] = 448.0, x[..., 204, :] * 1e35
    return x.to(DEVICE, dtype)


def assert_same(found: Tensor, expected: Tensor, what: str) -> None:
    """In every bit, but for NaN's sign and payload."""
    found, expected = found.cpu(), expected.cpu()
    assert found.dtype == expected.dtype and found.shape == expected.shape, (what, found.shape, expected.shape)
    as_whole = torch.uint8 if found.dtype == torch.float8_e4m3fn else torch.int32
    same = found.contiguous().view(as_whole) == expected.contiguous().view(as_whole)
    same |= found.float().isnan() & expected.float().isnan()
    assert same.all(), f"{what}: {(~same).sum()} of {same.numel()} differ"


def padded(x: Tensor, rows: int) -> Tensor:
    return F.pad(x, (0, 0, 0, -x.shape[0] % rows))


def assert_tiles(found, x: Tensor, power_of_two: bool) -> None:
    """Tiles of 1 x 128 of x [R, C], R padded to 16."""
    for device in {"cpu", DEVICE}:  # torch's quantisation is the same on both
        values, scale = op.quantise(padded(x, 16).to(device), 1, power_of_two)
        assert_same(found.values, values, "values")
        assert_same(found.scale, scale, "scale")
    assert found.values.is_contiguous() and (scale.shape[1] == 1 or found.scale.stride() == (1, len(scale)))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_activations(shape, dtype, power_of_two):
    x = numbers(*shape, dtype=dtype)
    (rows,), (columns,) = activations(x, [len(x)], power_of_two, by_rows=True, by_columns=True)
    assert_tiles(rows, x, power_of_two)
    assert_tiles(columns, x.T, power_of_two)
    ((alone,), nothing) = activations(x, [len(x)], power_of_two, by_rows=True)
    assert nothing == [] and torch.equal(alone.values.view(torch.uint8), rows.values.view(torch.uint8))
    (nothing, (alone,)) = activations(x, [len(x)], power_of_two, by_columns=True)
    assert nothing == [] and torch.equal(alone.values.view(torch.uint8), columns.values.view(torch.uint8))


@pytest.mark.parametrize("counts", [[129, 0, 1, 0, 129], [0, 259], [259, 0], [16, 112, 131]])
def test_groups_are_quantised_by_themselves(counts):
    x = numbers(259, 301)
    rows, columns = activations(x, counts, True, by_rows=True, by_columns=True)
    for of_rows, of_columns, part in zip(rows, columns, x.split(counts), strict=True):
        if len(part):
            assert_tiles(of_rows, part, True)
            assert_tiles(of_columns, part.T, True)
        else:
            assert of_rows.values.shape == (0, 384) and of_columns.values.shape == (304, 0)
    nothing = activations(x[:0], [0, 0], True, by_rows=True, by_columns=True)
    assert all(operand.values.numel() == 0 for side in nothing for operand in side)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_weights(shape, dtype, power_of_two):
    weight = torch.stack([numbers(*shape, dtype=dtype, seed=seed) for seed in range(2)])
    for transposed in (False, True):
        for found, one in zip(weights(weight, power_of_two, transposed), weight, strict=True):
            one = one.T if transposed else one
            for device in {"cpu", DEVICE}:
                values, scale = op.quantise(one.to(device), 128, power_of_two)
                assert_same(found.values, values, "values")
                blocks = scale.shape[1]
                assert_same(found.scale[:blocks].T, scale, "scale")
            assert (found.scale[blocks:] == 0).all() and len(found.scale) % 4 == 0
            assert scale.shape[0] == 1 or found.scale.stride() == (1, len(found.scale))


def test_strides():
    """A part of the columns, rows far apart, and a transpose, which is copied."""
    x = numbers(259, 400)[:, 50:351]
    for given in (x, x.T.contiguous().T):
        (rows,), (columns,) = activations(given, [259], True, by_rows=True, by_columns=True)
        assert_tiles(rows, x, True)
        assert_tiles(columns, x.T, True)
        found, expected = (weights(t.unsqueeze(0), True)[0] for t in (given, x.contiguous()))
        assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 9, 128), (70, 32), (1, 1, 2), (5, 1), (0, 4, 128)])
def test_rotation(shape, dtype):
    x = numbers(*shape, dtype=dtype)
    if len(x) > 4:
        x[0], x[1] = 0.0, x[1] * 1e-6
    values, scale = rotate_and_quantise(x)
    expected = quantise(hadamard(x.cpu().float()))
    assert_same(values, expected[0], "values")
    assert_same(scale, expected[1], "scale")
