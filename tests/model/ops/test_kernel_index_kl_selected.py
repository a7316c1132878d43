"""The Triton kernels of index_kl_selected against fp64: scores and every gradient, odd shapes, holes, dtypes."""

import pytest
import torch
from torch import Tensor

from model.ops.index_topk.reference import index_scores
from tests.model.ops.cases import assert_close
from tests.model.ops.interpreter import DEVICE, poison_allocations
from tests.model.ops.test_kernel_sparse_mla import select

from model.ops.index_kl_selected import kernel  # isort: skip  (the interpreter is chosen above)

# (query rows, keys, heads, di, k)
SHAPES = [(5, 9, 1, 16, 7), (4, 40, 3, 32, 37), (3, 33, 8, 24, 20), (6, 5, 20, 16, 1)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # bf16: dS is rounded to it for its products


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison_allocations(monkeypatch)


class Case:
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, whole: bool = False) -> None:
        rows, keys, heads, width, k = shape
        generator = torch.Generator().manual_seed(0)
        sizes = (rows, heads, width), (keys, width), (rows, heads), (rows, k)
        values = [torch.randn(s, generator=generator) for s in sizes]
        if whole:  # products of whole numbers are often exactly 0: relu'(0) = 0 shows
            values = [(v * 0.6).round() for v in values]
        self.q, self.k, self.w = (v.to(dtype).to(DEVICE) for v in values[:3])
        idx = select(1, rows, keys, k)
        self.idx = idx.to(DEVICE)
        self.d_scores = values[3].masked_fill(idx < 0, torch.nan).to(DEVICE)  # not to be read there
        inputs = [t.double().cpu().requires_grad_() for t in (self.q, self.k, self.w)]
        chosen = index_scores(*inputs).gather(1, idx.long().clamp(min=0))
        self.scores = chosen.detach().masked_fill(idx < 0, -torch.inf)
        upstream = values[3].double().masked_fill(idx < 0, 0.0)
        self.d_q, self.d_k, self.d_w = torch.autograd.grad(chosen, inputs, upstream)

    def backward(self, **options) -> tuple[Tensor, Tensor, Tensor]:
        d_k = torch.ones(self.k.shape, device=DEVICE)  # added to, not overwritten
        d_q, d_w = kernel.backward(self.q, self.k, self.w, self.idx, self.d_scores, d_k, **options)
        return d_q, d_k - 1, d_w

    def check(self, actual: tuple[Tensor, ...]) -> None:
        for mine, expected in zip(actual, (self.d_q, self.d_k, self.d_w), strict=True):
            assert mine.dtype == torch.float32
            limit = TOLERANCE[self.q.dtype] * max(expected.abs().max().item(), 0.1)
            assert (mine.double().cpu() - expected).abs().max().item() <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_scores(shape, dtype):
    case = Case(shape, dtype)
    scores = kernel.scores(case.q, case.k, case.w, case.idx)
    assert_close(scores.cpu(), case.scores)  # sums are fp32 whatever the inputs; -inf at -1
    assert scores[0].isneginf().all()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape, dtype, deterministic):
    case = Case(shape, dtype)
    case.check(case.backward(deterministic=deterministic))


def test_no_gradient_at_zero():
    case = Case((6, 30, 4, 16, 20), torch.float32, whole=True)
    products = torch.einsum("thd,sd->ths", case.q, case.k)
    assert products.eq(0).any()
    case.check(case.backward())


def test_every_configuration_gives_the_same():
    case = Case((5, 60, 5, 16, 50), torch.float32)
    for keys in (16, 32, 64):
        config = kernel.Config(keys, 4, 1)
        assert_close(kernel.scores(case.q, case.k, case.w, case.idx, config=config).cpu(), case.scores)
        for options in ({}, {"deterministic": True}, {"deterministic": True, "workspace": 1}):
            case.check(case.backward(config=config, **options))


def test_repeats_are_bitwise_equal():
    case = Case(SHAPES[1], torch.bfloat16)
    first, again = (
        [kernel.scores(case.q, case.k, case.w, case.idx), *case.backward(deterministic=True)] for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
