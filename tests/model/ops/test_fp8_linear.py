"""FP8 linears: the op against a brute force in numpy, products and gradients; what the rounding costs, from both sides;
and the operands handed to cuBLAS, against its documented layout on a CPU and against emulation on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model import fp8
from model.ops.fp8_linear import fp8_grouped_linear, fp8_linear, fp8_round_weight, op
from model.ops.fp8_linear import reference as ref
from tests.model.ops.cases import assert_close, randn
from tests.model.ops.interpreter import DEVICE

# tokens, inputs, outputs: ragged, whole blocks, less than one block, a single token, DeepSeek's 576 = 4.5 blocks
SHAPES = [(150, 200, 260), (128, 256, 128), (7, 20, 33), (1, 129, 1), (130, 64, 576)]


def make(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Leaf tensors whose rows and columns differ in size by up to e^3: blocks in the wrong direction show."""
    found = []
    for t in randn(seed, *shapes):
        spread = [torch.linspace(-1.5, 1.5, size, dtype=t.dtype).roll(size // 3).exp() for size in t.shape[-2:]]
        found.append((t.detach() * spread[0][:, None] * spread[1]).to(dtype).requires_grad_())
    return found


def to_numpy(t: Tensor) -> np.ndarray:
    return t.detach().float().cpu().numpy()


def run(function, *inputs: Tensor, seed: int = 99) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, upstream gradient and the gradients of the inputs."""
    y = function(*inputs)
    upstream = make(seed, tuple(y.shape), dtype=y.dtype)[0].detach().to(y.device)
    return y, upstream, list(torch.autograd.grad(y, inputs, upstream))


def relative(found: Tensor, exact: Tensor) -> float:
    found, exact = found.double(), exact.double()
    return ((found - exact).norm() / exact.norm()).item()


def assert_is_reference(function, x: Tensor, weight: Tensor, power_of_two: bool) -> None:
    y, upstream, (d_x, d_weight) = run(function, x, weight)
    expected = [
        ref.forward(to_numpy(x), to_numpy(weight), power_of_two),
        *ref.gradients(to_numpy(x), to_numpy(weight), to_numpy(upstream), power_of_two),
    ]
    for name, mine, theirs in zip(("y", "d_x", "d_weight"), (y, d_x, d_weight), expected, strict=True):
        assert_close(mine.cpu(), torch.from_numpy(theirs), name)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SHAPES)
def test_the_three_products_are_the_references(tokens, inputs, outputs, power_of_two):
    x, weight = make(0, (tokens, inputs), (outputs, inputs))
    assert_is_reference(lambda *a: fp8_linear(*a, power_of_two=power_of_two), x, weight, power_of_two)


@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_rounding_is_the_references_bit_for_bit(rows, power_of_two):
    for size in (1e-30, 1e-6, 1.0, 3e4):
        (x,) = make(1, (259, 301))
        x = x.detach() * size
        found, expected = op.rounded(x, rows, power_of_two), ref.rounded(to_numpy(x), rows, 128, power_of_two)
        assert np.array_equal(found.numpy(), expected.astype(np.float32))


def test_every_e4m3_number_and_every_border_rounds_as_torch_does():
    every = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = every[every.isfinite()].unique()
    assert len(numbers) == 253 and numbers.max() == ref.LARGEST == fp8.E4M3_MAX
    assert np.array_equal(ref.e4m3(numbers.numpy()), numbers.numpy())
    middle = (numbers[1:] + numbers[:-1]) / 2  # ties, and their neighbours on both sides
    near = torch.cat([middle, middle.nextafter(middle + 1), middle.nextafter(middle - 1)])
    near = torch.cat([near, torch.tensor([448.1, -463.9, 464.0, torch.nan])])
    expected = near.to(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(ref.e4m3(near.numpy()), expected, equal_nan=True)
    # above 464 torch's cast saturates or gives NaN, as the version has it: the op never gets there
    assert np.isnan(ref.e4m3(np.array([464.1, -465.0, 1e9, np.inf]))).all()


@pytest.mark.parametrize("power_of_two", [False, True])
def test_no_division_is_by_a_number(power_of_two):
    """Torch on a GPU multiplies by the reciprocal of a divisor that is no tensor: another scale than elsewhere, and
    bf16 numbers on a tie between two of e4m3's go the other way."""
    divisors = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket == torch.ops.aten.div:
                divisors.append(args[1])
            return func(*args, **(kwargs or {}))

    with Recorder():
        op.quantise(torch.randn(5, 300), 1, power_of_two)
    assert len(divisors) == 2 and all(isinstance(divisor, Tensor) for divisor in divisors), divisors


@pytest.mark.parametrize("power_of_two", [False, True])
def test_numbers_on_the_grid_survive(power_of_two):
    """Rows that hold e4m3's own numbers, the largest among them, have scale 1 and lose nothing."""
    every = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn).float()
    x = every.nan_to_num(448.0).view(2, 128)
    assert torch.equal(op.rounded(x, 1, power_of_two), x) and torch.equal(op.rounded(x, 128, power_of_two), x)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_nothing_saturates_and_the_range_is_used(power_of_two):
    """At every amax of a row, even where amax / 448 is rounded down or is subnormal, the cast sees at most 448."""
    amax = torch.cat([torch.logspace(-44, 38, 3000), torch.tensor([448.0, 448.0 * 2**-9, 1e-45, 3.4e38])])
    values, scale = op.quantise(amax[:, None], 1, power_of_two)
    largest, normal = values.float().amax(1), amax > op.AMAX_LEAST
    assert scale.isfinite().all() and (scale > 0).all() and not values.isnan().any()
    assert (largest <= 448).all() and (largest[normal] > (223 if power_of_two else 447)).all()
    if power_of_two:
        assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))


def test_blocks_of_zeros():
    x, weight = make(2, (150, 300), (200, 300))
    with torch.no_grad():
        x[:, :128], x[7], weight[:128, 128:256] = 0, 0, 0
    for rows, part in ((1, x), (128, weight)):
        values, scale = op.quantise(part.detach(), rows)
        empty = scale == 1
        assert empty.any() and not empty.all()
    assert_is_reference(fp8_linear, x, weight, False)
    assert fp8_linear(x, weight)[7].eq(0).all()
    nothing = fp8_linear(torch.zeros(3, 5, requires_grad=True), torch.zeros(4, 5, requires_grad=True))
    assert nothing.eq(0).all()
    assert all(g.eq(0).all() for g in run(fp8_linear, *(torch.zeros(3, 5).requires_grad_() for _ in range(2)))[2])


def test_small_gradients_keep_their_precision():
    """A scale has no floor: a gradient of 1e-9 is rounded as well as one of 1 (model/fp8.py's weights have a floor)."""
    x, weight, grad = (t.detach() for t in make(3, (60, 200), (70, 200), (60, 70)))
    x.requires_grad_()
    (large,) = torch.autograd.grad(fp8_linear(x, weight, power_of_two=True), x, grad)
    (small,) = torch.autograd.grad(fp8_linear(x, weight, power_of_two=True), x, grad * 2**-30)
    assert torch.equal(small * 2**30, large)


def test_an_outlier_costs_its_own_block_alone():
    """Read through the identity, which is exact: what is left of x."""
    x = make(4, (6, 384))[0].detach()
    eye = torch.eye(384)
    plain = fp8_linear(x, eye, power_of_two=True)
    loud = x.clone()
    loud[2, 130] = 3e5
    found = fp8_linear(loud, eye, power_of_two=True)
    touched = torch.zeros_like(x, dtype=torch.bool)
    touched[2, 128:256] = True
    assert torch.equal(found[~touched], plain[~touched])
    touched[2, 130] = False
    assert relative(plain[touched], x[touched]) < 0.04
    assert relative(found[touched], x[touched]) > 0.5  # their step is 3e5 / 448 * 2^-9
    assert found[2, 130].item() == pytest.approx(3e5, rel=2**-4)
    weight = make(5, (300, 300))[0].detach()
    louder = weight.clone()
    louder[140, 140] = 3e5
    same = fp8_round_weight(louder) == fp8_round_weight(weight)
    assert same[:128].all() and same[256:].all() and same[:, :128].all() and same[:, 256:].all()
    assert not same[128:256, 128:256].all()


@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_error_is_e4m3s(power_of_two):
    """4 significant bits: a number is off by up to 2^-4 and by 2.6% in the mean square, a product of two by 3.7%."""
    x, weight = randn(6, (256, 512), (384, 512), dtype=torch.float32)
    found = run(lambda *a: fp8_linear(*a, power_of_two=power_of_two), x, weight)
    exact = run(F.linear, x, weight)
    for mine, theirs in zip((found[0], *found[2]), (exact[0], *exact[2]), strict=True):
        assert 0.03 < relative(mine, theirs) < 0.045
    assert 0.02 < relative(fp8_round_weight(weight, power_of_two), weight) < 0.032
    mean = (found[0] / exact[0]).median().item()
    assert abs(mean - 1) < 0.01  # rounding to the nearest has no bias


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_what_is_not_finite_stays_so(bad, power_of_two):
    x, weight = (t.detach() for t in make(7, (140, 200), (150, 200)))
    x[3, 5] = bad
    assert fp8_linear(x, weight, power_of_two)[3].isnan().all()
    assert fp8_linear(x, weight, power_of_two)[torch.arange(140) != 3].isfinite().all()
    x[3, 5] = 1.0
    weight[130, 5] = bad
    y = fp8_linear(x, weight, power_of_two)
    assert y[:, 128:].isnan().all() and y[:, :128].isfinite().all()
    assert fp8_round_weight(weight, power_of_two)[130, 5].isnan()
    weight[130, 5], grad = 1.0, torch.ones(140, 150)
    grad[3, 5] = bad
    leaves = x.requires_grad_(), weight.requires_grad_()
    d_x, d_weight = torch.autograd.grad(fp8_linear(*leaves, power_of_two), leaves, grad)
    assert d_x[3].isnan().all() and d_x[4:].isfinite().all()
    assert d_weight[5].isnan().all() and d_weight[6:].isfinite().all()


@pytest.mark.parametrize("counts", [[70, 0, 129, 1], [0, 0, 0, 5], [0, 0, 0, 0], [200, 0, 0, 0]])
def test_grouped_is_each_expert_by_itself(counts):
    """Bit for bit, the tiles of the weight's gradient included: they start anew with every expert's tokens."""
    x, weight = make(8, (sum(counts), 140), (4, 150, 140))
    y, upstream, (d_x, d_weight) = run(lambda x, w: fp8_grouped_linear(x, counts, w), x, weight)
    rows = 0
    for e, count in enumerate(counts):
        part = slice(rows, rows := rows + count)
        inputs = [x[part].detach().requires_grad_(), weight[e].detach().requires_grad_()]
        alone = fp8_linear(*inputs)
        gradients = torch.autograd.grad(alone, inputs, upstream[part])
        for mine, theirs in zip((y[part], d_x[part], d_weight[e]), (alone, *gradients), strict=True):
            assert torch.equal(mine, theirs)
    assert all(d_weight[e].eq(0).all() for e, count in enumerate(counts) if count == 0)


@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 5), (2, 0, 4)])
def test_leading_dimensions(leading):
    inputs = [torch.randn(*leading, 40).requires_grad_(), torch.randn(24, 40).requires_grad_()]
    y = fp8_linear(*inputs)
    d_x, d_weight = torch.autograd.grad(y, inputs, torch.ones_like(y))
    assert y.shape == (*leading, 24) and d_x.shape == inputs[0].shape
    assert torch.equal(y.reshape(-1, 24), fp8_linear(inputs[0].reshape(-1, 40), inputs[1]))
    assert y.numel() > 0 or d_weight.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("master", [torch.bfloat16, torch.float32])
def test_dtypes(dtype, master):
    """Result and d_x in x's dtype, d_weight in the master's; inside, the same numbers, rounded once at the end."""
    (x,), (weight,) = make(9, (50, 200), dtype=dtype), make(10, (60, 200), dtype=master)
    y, upstream, (d_x, d_weight) = run(fp8_linear, x, weight)
    assert (y.dtype, d_x.dtype, d_weight.dtype) == (dtype, dtype, master)
    wide = [x.detach().float().requires_grad_(), weight.detach().float().requires_grad_()]
    expected = fp8_linear(*wide)
    gradients = torch.autograd.grad(expected, wide, upstream.float())
    assert torch.equal(y, expected.to(dtype))
    assert torch.equal(d_x, gradients[0].to(dtype)) and torch.equal(d_weight, gradients[1].to(master))


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside):
    """As F.linear: bf16 comes out and the gradients have the leaves' dtypes. The products stay as they are, also where
    backward runs under autocast."""
    x, weight = make(11, (50, 200), (60, 200))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fp8_linear(x, weight)
        grouped = fp8_grouped_linear(x, [20, 30], torch.stack([weight, weight]))
    upstream = make(12, (50, 60))[0].detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
        d_x, d_weight = torch.autograd.grad(y, (x, weight), upstream)
    assert y.dtype == grouped.dtype == torch.bfloat16 and d_x.dtype == d_weight.dtype == torch.float32
    narrow = x.detach().bfloat16().requires_grad_()
    expected = fp8_linear(narrow, weight)
    gradients = torch.autograd.grad(expected, (narrow, weight), upstream)
    assert torch.equal(y, expected) and torch.equal(grouped, expected)
    assert torch.equal(d_x, gradients[0].float()) and torch.equal(d_weight, gradients[1])


def test_frozen_inputs_and_odd_strides():
    x, weight = make(13, (50, 64), (60, 64))
    (alone,) = torch.autograd.grad(fp8_linear(x.detach(), weight).sum(), weight)  # the gradient is an expanded number
    both = torch.autograd.grad(fp8_linear(x, weight).sum(), (x, weight))
    assert torch.equal(alone, both[1])
    (d_x,) = torch.autograd.grad(fp8_linear(x, weight.detach()).sum(), x)
    assert torch.equal(d_x, both[0])
    strided = [t.detach().T.contiguous().T.requires_grad_() for t in (x, weight)]
    assert not strided[0].is_contiguous()
    assert torch.equal(fp8_linear(*strided), fp8_linear(x, weight))
    assert all(
        torch.equal(a, b) for a, b in zip(torch.autograd.grad(fp8_linear(*strided).sum(), strided), both, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_weight_passes_the_gradient_straight_through(dtype):
    (weight,) = make(14, (200, 300), dtype=dtype)
    found = fp8_round_weight(weight)
    expected = torch.from_numpy(ref.rounded(to_numpy(weight), 128, 128)).float().to(dtype)
    assert found.dtype == dtype and torch.equal(found, expected)
    assert not torch.equal(found, weight)
    upstream = torch.randn(200, 300).to(dtype)
    assert torch.equal(torch.autograd.grad(found, weight, upstream)[0], upstream)
    assert torch.equal(fp8_linear(torch.eye(300), weight, power_of_two=True).T, fp8_round_weight(weight, True).float())


def test_training_sees_the_weight_that_an_export_stores():
    weight = make(15, (200, 300))[0].detach()
    assert torch.equal(fp8_round_weight(weight, power_of_two=True), fp8.dequantize(*fp8.quantize(weight)))


def test_mistakes_are_named():
    x, weight = torch.zeros(4, 8), torch.zeros(6, 8)
    with pytest.raises(ValueError, match="bf16, fp16 or fp32, got torch.float64"):
        fp8_linear(x.double(), weight)
    with pytest.raises(ValueError, match=r"\[4, 8\] and weight \[6, 9\] differ"):
        fp8_linear(x, torch.zeros(6, 9))
    with pytest.raises(ValueError, match="'triton' is neither"):
        fp8_linear(x, weight, backend="triton")
    with pytest.raises(ValueError, match="capability 9.x, x is on cpu"):
        fp8_linear(x, weight, backend="scaled_mm")
    for counts in ([4], [1, 2], [2, 2, 0]):
        with pytest.raises(ValueError, match="do not divide 4 rows among 2 experts"):
            fp8_grouped_linear(x, counts, torch.zeros(2, 6, 8))
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    upstream = torch.ones(4, 6, requires_grad=True)
    (d_x,) = torch.autograd.grad(fp8_linear(*leaves), leaves[:1], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_x.sum().backward()


def documented_scaled_mm(a, b, scale_a, recipe_a, scale_b, recipe_b, output_dtype) -> Tensor:
    """torch.nn.functional.scaled_mm in words: shapes and strides that cuBLAS wants (pytorch #166752), then the product.

    Torch's own check, on meta tensors, must agree.
    """
    (m, k), n = a.shape, b.shape[1]
    blocks = k // 128
    padded = blocks + -blocks % 4
    assert k % 128 == 0 and m % 16 == 0 and n % 16 == 0 and a.dtype == b.dtype == torch.float8_e4m3fn
    assert a.stride() == (k, 1) and b.stride() == (1, k) and scale_a.dtype == scale_b.dtype == torch.float32
    assert recipe_a == F.ScalingType.BlockWise1x128
    assert scale_a.shape == (m, blocks) and scale_a.stride() == (1, m)
    if recipe_b == F.ScalingType.BlockWise1x128:
        assert scale_b.shape == (n, blocks) and scale_b.stride() == (1, n)
        scale_of_b = scale_b.T
    else:
        assert recipe_b == F.ScalingType.BlockWise128x128 and n % 128 == 0
        assert scale_b.shape == (padded, n // 128) and scale_b.stride() == (1, padded)
        scale_of_b = scale_b[:blocks].repeat_interleave(128, 1)
    shells = [t.to("meta") for t in (a, b, scale_a, scale_b)]
    assert all(shell.stride() == t.stride() for shell, t in zip(shells, (a, b, scale_a, scale_b), strict=True))
    shape = SCALED_MM(shells[0], shells[1], shells[2], recipe_a, shells[3], recipe_b, output_dtype=output_dtype).shape
    assert shape == (m, n)
    total = torch.zeros(m, n, device=a.device)
    for i in range(blocks):
        part = slice(128 * i, 128 * i + 128)
        total += (a[:, part].float() @ b[part].float()) * scale_a[:, i, None] * scale_of_b[i]
    return total.to(output_dtype)


SCALED_MM = F.scaled_mm


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [*SHAPES, (520, 700, 33)])
def test_operands_of_scaled_mm(monkeypatch, tokens, inputs, outputs, power_of_two):
    calls = []
    monkeypatch.setattr(F, "scaled_mm", lambda *a, **k: (calls.append(a), documented_scaled_mm(*a, **k))[1])
    monkeypatch.setattr(op, "has_block_scaled_mm", lambda device: True)
    x, weight = (t.detach().to(DEVICE).requires_grad_() for t in make(16, (tokens, inputs), (outputs, inputs)))
    assert_is_reference(lambda *a: fp8_linear(*a, power_of_two=power_of_two), x, weight, power_of_two)
    assert [call[5].name for call in calls] == ["BlockWise128x128", "BlockWise128x128", "BlockWise1x128"]
    fp8_grouped_linear(x, [0, tokens], torch.stack([weight, weight]))
    assert len(calls) == 4  # nothing is launched for a group without tokens


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and WINNOW_TEST_GPU=1")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [*SHAPES, (520, 700, 33), (4096, 1536, 2048)])
def test_scaled_mm_is_the_emulation(tokens, inputs, outputs, dtype):
    if not op.has_block_scaled_mm(torch.device("cuda")):
        pytest.skip("cuBLAS scales blocks on compute capability 9.x alone")
    leaves = [t.detach().cuda().requires_grad_() for t in make(17, (tokens, inputs), (outputs, inputs), dtype=dtype)]
    upstream = make(18, (tokens, outputs), dtype=dtype)[0].detach().cuda()
    found, expected = (
        (y, *torch.autograd.grad(y, leaves, upstream))
        for y in (fp8_linear(*leaves, backend=backend) for backend in ("scaled_mm", "emulate"))
    )
    for name, mine, theirs in zip(("y", "d_x", "d_weight"), found, expected, strict=True):
        # Hopper's tensor cores add e4m3 products with about 14 bits inside a block of 128: simulated so, these sums are
        # off by 3.5e-4. Then both sides are rounded to bf16: numbers d apart fall ulp apart in d / ulp of the cases,
        # so by sqrt(3.5e-4 * 2^-7.5) = 1.4e-3 in the mean square. An operand rounded another way costs 2e-3 at least.
        assert relative(mine, theirs) < 2e-3, name
