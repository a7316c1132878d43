"""The Triton kernels of sparse_mla against the fp64 reference: forward, target, every gradient, odd shapes and dtypes.

On a machine without a GPU the kernels run under Triton's interpreter (slowly, so sizes are small); with one, compiled.
"""

import pytest
import torch
from torch import Tensor

from model.ops.sparse_mla import reference as ref
from tests.model.ops.cases import assert_close
from tests.model.ops.interpreter import DEVICE, poison_allocations

from model.ops.scatter_kernel import segment_sum  # isort: skip  (the interpreter is chosen above)
from model.ops.sparse_mla import kernel  # isort: skip

SCALE = 0.3
# (query rows, keys, heads, C, r, k): heads below, at and above a tile; k that no tile divides; rows != keys
SHAPES = [(5, 9, 1, 16, 8, 7), (4, 40, 3, 64, 16, 37), (3, 33, 8, 16, 16, 20), (6, 5, 20, 16, 8, 1)]
# P and dS are rounded to bf16 (8 bits) for their products and so is every result: a few 2^-9 of the largest entry.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison_allocations(monkeypatch)


def select(seed: int, rows: int, keys: int, k: int, holes: float = 0.3) -> Tensor:
    """Distinct random positions with -1 anywhere; the first row has no entry at all."""
    generator = torch.Generator().manual_seed(seed)
    idx = torch.full((rows, k), -1, dtype=torch.int32)
    for t in range(1, rows):
        chosen = torch.randperm(keys, generator=generator)[:k].int()
        idx[t, : len(chosen)] = chosen
        idx[t] = idx[t, torch.randperm(k, generator=generator)]
    return idx.masked_fill(torch.rand(rows, k, generator=generator) < holes, -1)


class Case:
    """Inputs on the device, and what the reference makes of the same (already rounded) numbers in fp64."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, holes: float = 0.3) -> None:
        rows, keys, heads, value_dim, rope, k = shape
        generator = torch.Generator().manual_seed(seed)
        sizes = (rows, heads, value_dim + rope), (keys, value_dim + rope), (rows, heads, value_dim)
        self.q, self.kv, self.d_out = (torch.randn(s, generator=generator).to(dtype).to(DEVICE) for s in sizes)
        idx = select(seed + 1, rows, keys, k, holes)
        self.idx, self.value_dim = idx.to(DEVICE), value_dim
        q, kv = (t.double().cpu().requires_grad_() for t in (self.q, self.kv))
        self.out, self.lse = ref.sparse_mla(q, kv, idx.long(), SCALE, value_dim)
        self.d_q, self.d_kv = torch.autograd.grad(self.out, (q, kv), self.d_out.double().cpu())
        logits = torch.einsum("thd,sd->ths", q, kv) * SCALE
        p = torch.exp(logits - self.lse.masked_fill(self.lse.isneginf(), 0.0)[..., None]).mean(1).detach()
        self.target = p.gather(1, idx.long().clamp(min=0)).masked_fill(idx < 0, 0.0)

    def forward(self, config=None) -> tuple[Tensor, Tensor]:
        return kernel.forward(self.q, self.kv, self.idx, SCALE, self.value_dim, config=config)

    def backward(self, **options) -> tuple[Tensor, Tensor]:
        out, lse = self.out.to(self.q).detach(), self.lse.float().to(DEVICE).detach()
        d_kv = torch.ones(self.kv.shape, device=DEVICE)  # added to, not overwritten
        d_q = kernel.backward(self.q, self.kv, self.idx, out, lse, self.d_out, SCALE, d_kv, **options)
        return d_q, d_kv - 1


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype] * max(expected.abs().max().item(), 0.1)
    error = (actual.double().cpu() - expected).abs().max().item()
    assert error <= limit, f"error {error:.3e} above {limit:.3e}"  # also where it is NaN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_target(shape, dtype):
    case = Case(shape, dtype)
    out, lse = case.forward()
    assert out.dtype == dtype and lse.dtype == torch.float32
    close(out, case.out.detach(), dtype)
    assert_close(lse.cpu(), case.lse.detach())  # fp32 sums whatever the inputs
    assert out[0].eq(0).all() and lse[0].isneginf().all()
    close(kernel.target(case.q, case.kv, case.idx, lse, SCALE), case.target, torch.float32)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape, dtype, deterministic):
    case = Case(shape, dtype)
    d_q, d_kv = case.backward(deterministic=deterministic)
    assert d_q.dtype == dtype
    close(d_q, case.d_q, dtype)
    close(d_kv, case.d_kv, dtype)
    assert d_q[0].eq(0).all()


def test_half_precision():
    case = Case(SHAPES[1], torch.float16)
    close(case.forward()[0], case.out.detach(), torch.float16)
    for actual, expected in zip(case.backward(), (case.d_q, case.d_kv), strict=True):
        close(actual, expected, torch.float16)


def test_every_configuration_gives_the_same():
    """Tiles of any size, more heads than the largest tile in each kernel, and sub-chunks of a single row."""
    case = Case((3, 50, 20, 32, 8, 45), torch.float32)
    for config in (kernel.Config(16, 16, 4, 1), kernel.Config(32, 64, 4, 2)):
        out, lse = case.forward(config)
        close(out, case.out.detach(), torch.float32)
        close(kernel.target(case.q, case.kv, case.idx, lse, SCALE, config=config), case.target, torch.float32)
    for scores, gradients in (
        ((16, 32), (16, 16)),
        ((64, 16), (32, 64)),
        ((32, 16), (64, 16)),
    ):
        configs = (kernel.Config(*sizes, 4, 1) for sizes in (scores, gradients))
        config = kernel.BackwardConfig(*configs, columns=32 if scores[0] == 64 else 16)
        for options in ({}, {"deterministic": True}, {"deterministic": True, "workspace": 1}, {"workspace": 1}):
            d_q, d_kv = case.backward(config=config, **options)
            close(d_q, case.d_q, torch.float32)
            close(d_kv, case.d_kv, torch.float32)


def test_whole_tiles_of_nothing():
    """Entries behind more -1 than a tile holds: a tile without any must leave the running softmax finite."""
    case = Case((3, 60, 2, 16, 8, 40), torch.float32, holes=0.0)
    case.idx[1:, :33] = -1
    idx = case.idx.cpu().long()
    q, kv = (t.double().cpu().requires_grad_() for t in (case.q, case.kv))
    case.out, case.lse = ref.sparse_mla(q, kv, idx, SCALE, 16)
    expected = torch.autograd.grad(case.out, (q, kv), case.d_out.double().cpu())
    out, lse = case.forward(kernel.Config(16, 16, 4, 1))
    close(out, case.out.detach(), torch.float32)
    assert_close(lse.cpu(), case.lse.detach())
    for actual, wanted in zip(case.backward(), expected, strict=True):
        close(actual, wanted, torch.float32)


def test_unread_positions_may_hold_anything():
    """-1 stands for no key: a NaN in row 0, which no row selects, must not pass."""
    case = Case(SHAPES[2], torch.float32)
    case.idx[case.idx == 0] = -1
    case.kv[0] = torch.nan
    out, lse = case.forward()
    assert out.isfinite().all() and kernel.target(case.q, case.kv, case.idx, lse, SCALE).isfinite().all()
    d_kv = torch.zeros(case.kv.shape, device=DEVICE)
    d_q = kernel.backward(case.q, case.kv, case.idx, out, lse, case.d_out, SCALE, d_kv)
    assert d_q.isfinite().all() and d_kv.isfinite().all() and d_kv[0].eq(0).all()


@pytest.mark.parametrize("entries", [37, 1])  # one entry: its logit is the lse, far below 0 for some heads
def test_large_logits_stay_finite(entries):
    case = Case(SHAPES[1], torch.float32)
    case.q *= 300
    case.idx[1:, 0], case.idx[:, entries:] = 4, -1
    out, lse = case.forward()
    assert out.isfinite().all() and lse[1:].isfinite().all()
    d_kv = torch.zeros(case.kv.shape, device=DEVICE)
    d_q = kernel.backward(case.q, case.kv, case.idx, out, lse, case.d_out, SCALE, d_kv)
    assert d_q.isfinite().all() and d_kv.isfinite().all()


def test_repeats_are_bitwise_equal():
    case = Case(SHAPES[1], torch.bfloat16)
    first, again = ([*case.forward(), *case.backward(deterministic=True)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(case.backward()[0], first[2])  # d_q does not depend on the mode


def test_segment_sum_adds_in_order():
    """Against a loop in ascending order, with absent keys, -1 and a key that spans several blocks of rows."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 20, generator=generator).to(DEVICE)
    idx = torch.randint(-1, 6, (50,), generator=generator, dtype=torch.int32)
    idx[idx == 3] = 5
    idx[10:40] = 2
    into = torch.ones(7, 20, device=DEVICE)
    expected = into.double().cpu()
    for n, key in enumerate(idx.tolist()):
        if key >= 0:
            expected[key] += rows[n].double().cpu()
    rows[idx.to(DEVICE) < 0] = torch.nan  # not read
    segment_sum(rows, idx.to(DEVICE), into)
    close(into, expected, torch.float32)
    assert into[3].eq(1).all() and into[6].eq(1).all()
