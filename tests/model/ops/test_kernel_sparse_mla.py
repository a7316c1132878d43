"""The Triton kernels of sparse_mla, in both forms, against the fp64 reference: forward, target, every gradient, odd
shapes and dtypes.

On a machine without a GPU the kernels run under Triton's interpreter (slowly, so sizes are small); with one, compiled.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

from model.ops.sparse_mla import reference as ref
from tests.model.ops.cases import assert_close
from tests.model.ops.interpreter import DEVICE, poison_allocations

from model.ops.scatter_kernel import segment_sum  # isort: skip  (the interpreter is chosen above)
from model.ops.sparse_mla import kernel, written_kernel  # isort: skip

SCALE = 0.3
# (query rows, keys, heads, C, r, k): heads below, at and above a tile; k that no tile divides; rows != keys
SHAPES = [(5, 9, 1, 16, 8, 7), (4, 40, 3, 64, 16, 37), (3, 33, 8, 16, 16, 20), (6, 5, 20, 16, 8, 1)]
# For the form that writes P, powers of two from 16 heads and C = 64: more and fewer keys than a tile, and one
WRITTEN_SHAPES = [(5, 9, 16, 64, 16, 7), (4, 90, 32, 64, 16, 70), (3, 140, 16, 128, 32, 128), (4, 40, 16, 64, 16, 1)]
BOTH = [(kernel, shape) for shape in SHAPES] + [(written_kernel, shape) for shape in WRITTEN_SHAPES]
ONE_EACH = [BOTH[1], BOTH[5]]
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

    def __init__(self, form, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, holes: float = 0.3) -> None:
        self.form = form
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

    def forward(self, **options) -> tuple[Tensor, Tensor, Tensor]:
        """out, lse and the target."""
        inputs = self.q, self.kv, self.idx
        if self.form is written_kernel:
            return written_kernel.forward(*inputs, SCALE, self.value_dim, **options)
        out, lse = kernel.forward(*inputs, SCALE, self.value_dim, **options)
        return out, lse, kernel.target(*inputs, lse, SCALE, **options)

    def backward(self, **options) -> tuple[Tensor, Tensor]:
        out, lse = self.out.to(self.q).detach(), self.lse.float().to(DEVICE).detach()
        d_kv = torch.ones(self.kv.shape, device=DEVICE)  # added to, not overwritten
        d_q = self.form.backward(self.q, self.kv, self.idx, out, lse, self.d_out, SCALE, d_kv, **options)
        return d_q, d_kv - 1

    def backward_of(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        d_kv = torch.zeros(self.kv.shape, device=DEVICE)
        return self.form.backward(self.q, self.kv, self.idx, out, lse, self.d_out, SCALE, d_kv), d_kv


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype] * max(expected.abs().max().item(), 0.1)
    error = (actual.double().cpu() - expected).abs().max().item()
    assert error <= limit, f"error {error:.3e} above {limit:.3e}"  # also where it is NaN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("form", "shape"), BOTH)
def test_forward_and_target(form, shape, dtype):
    case = Case(form, shape, dtype)
    out, lse, target = case.forward()
    assert out.dtype == dtype and lse.dtype == torch.float32
    close(out, case.out.detach(), dtype)
    assert_close(lse.cpu(), case.lse.detach())  # fp32 sums whatever the inputs
    assert out[0].eq(0).all() and lse[0].isneginf().all()
    close(target, case.target, torch.float32 if form is kernel else dtype)  # a written P is rounded


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("form", "shape"), BOTH)
def test_backward(form, shape, dtype, deterministic):
    case = Case(form, shape, dtype)
    d_q, d_kv = case.backward(deterministic=deterministic)
    assert d_q.dtype == dtype
    close(d_q, case.d_q, dtype)
    close(d_kv, case.d_kv, dtype)
    assert d_q[0].eq(0).all()


@pytest.mark.parametrize(("form", "shape"), ONE_EACH)
def test_half_precision(form, shape):
    case = Case(form, shape, torch.float16)
    close(case.forward()[0], case.out.detach(), torch.float16)
    for actual, expected in zip(case.backward(), (case.d_q, case.d_kv), strict=True):
        close(actual, expected, torch.float16)


def test_every_configuration_gives_the_same():
    """Tiles of any size, more heads than the largest tile in each kernel, and sub-chunks of a single row."""
    case = Case(kernel, (3, 50, 20, 32, 8, 45), torch.float32)
    for config in (kernel.Config(16, 16, 4, 1), kernel.Config(32, 64, 4, 2)):
        out, _, target = case.forward(config=config)
        close(out, case.out.detach(), torch.float32)
        close(target, case.target, torch.float32)
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


@pytest.mark.parametrize("registers", [0, 2, 4])
def test_every_configuration_of_the_written_form_gives_the_same(registers):
    case = Case(written_kernel, (3, 50, 16, 64, 32, 45), torch.float32)
    tiles = {"keys": 16, "columns": 32, "query_columns": 64, "key_columns": 16}
    for sizes in (tiles, {"keys": 32, "columns": 64, "query_columns": 16, "key_columns": 32}):
        config = written_kernel.Config(
            **sizes, registers=registers, key_registers=registers // 2, num_warps=4, num_stages=1
        )
        for workspace in (1, 1 << 30):
            out, lse, target = case.forward(config=config, workspace=workspace)
            close(out, case.out.detach(), torch.float32)
            assert_close(lse.cpu(), case.lse.detach())
            close(target, case.target, torch.float32)
            for deterministic in (False, True):
                d_q, d_kv = case.backward(config=config, workspace=workspace, deterministic=deterministic)
                close(d_q, case.d_q, torch.float32)
                close(d_kv, case.d_kv, torch.float32)


def test_the_written_form_takes_what_it_can():
    def suits(heads: int, latent: int, rope: int, dtype: torch.dtype = torch.bfloat16, keys: int = 9) -> bool:
        q, kv = (torch.empty(*s, latent + rope, dtype=dtype, device="meta") for s in ((5, heads), (keys,)))
        return written_kernel.suits(q, kv, latent)

    assert suits(128, 512, 64) and suits(16, 64, 16, torch.float16)
    assert not suits(128, 512, 64, torch.float32) and not suits(128, 512, 64, keys=1 << 22)
    for sizes in ((8, 64, 16), (24, 64, 16), (256, 64, 16), (16, 32, 16), (16, 96, 16), (16, 64, 8), (16, 64, 24)):
        assert not suits(*sizes), sizes


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("form", "shape"), ONE_EACH)
def test_workspace_is_kept(monkeypatch, form, shape, deterministic):
    """What a call makes beside its results is as many whole rows as the bound holds."""
    case = Case(form, shape, torch.bfloat16)
    rows, _, heads, value_dim, rope, k = shape
    made: list[int] = []

    def counted(make, *args, **kwargs) -> Tensor:
        made.append((tensor := make(*args, **kwargs)).numel() * tensor.element_size())
        return tensor

    monkeypatch.setattr(torch, "empty", partial(counted, torch.empty))
    monkeypatch.setattr(torch, "empty_like", partial(counted, torch.empty_like))
    tiles = -(-k // 64)
    row = 2 * 2 * heads * 64 * tiles + (4 * k * (value_dim + rope) if deterministic else 0)  # P, dS and rows of dkv
    for whole in (1, 2, 3):
        made.clear()
        case.backward(deterministic=deterministic, workspace=whole * row + row - 1)
        assert sum(made) == whole * row + 2 * case.q.numel()
    if form is written_kernel and not deterministic:
        row = 2 * heads * 64 * tiles + 4 * heads * tiles  # P and the logarithms of its factors
        results = rows * (2 * heads * value_dim + 4 * heads + 4 * k)
        for whole in (1, 2, 3):
            made.clear()
            case.forward(workspace=whole * row + row - 1)
            assert sum(made) == whole * row + results


@pytest.mark.parametrize(("form", "heads", "value_dim", "rope"), [(kernel, 2, 16, 8), (written_kernel, 16, 64, 16)])
def test_whole_tiles_of_nothing(form, heads, value_dim, rope):
    """Entries behind more -1 than a tile holds: a tile without any must leave the running softmax finite."""
    case = Case(form, (3, 60, heads, value_dim, rope, 40), torch.float32, holes=0.0)
    case.idx[1:, :33] = -1
    idx = case.idx.cpu().long()
    q, kv = (t.double().cpu().requires_grad_() for t in (case.q, case.kv))
    case.out, case.lse = ref.sparse_mla(q, kv, idx, SCALE, value_dim)
    expected = torch.autograd.grad(case.out, (q, kv), case.d_out.double().cpu())
    small = kernel.Config(16, 16, 4, 1) if form is kernel else written_kernel.Config(keys=16, num_warps=4, num_stages=1)
    out, lse, target = case.forward(config=small)
    close(out, case.out.detach(), torch.float32)
    assert_close(lse.cpu(), case.lse.detach())
    assert target[:, :33].eq(0).all() and abs(target[1:].sum(1) - 1).max() < 1e-5
    for actual, wanted in zip(case.backward(), expected, strict=True):
        close(actual, wanted, torch.float32)


@pytest.mark.parametrize(("form", "heads", "value_dim", "rope"), [(kernel, 2, 16, 8), (written_kernel, 16, 64, 16)])
def test_nothing_before_logits_far_below_zero(form, heads, value_dim, rope):
    """A tile without an entry is scaled by nothing that is infinite."""
    case = Case(form, (3, 60, heads, value_dim, rope, 40), torch.float32, holes=0.0)
    case.idx[1:, :33] = -1
    case.kv[:, 0], case.q[..., 0] = 40.0, -40.0
    small = kernel.Config(16, 16, 4, 1) if form is kernel else written_kernel.Config(keys=16, num_warps=4, num_stages=1)
    out, lse, target = case.forward(config=small)
    assert (lse[1:] < -300).all() and abs(target[1:].sum(1) - 1).max() < 1e-3
    assert abs(out[1:, :, 0] - 40.0).max() < 1e-2  # a mean of values that are all 40


@pytest.mark.parametrize(("form", "shape"), ONE_EACH)
def test_unread_positions_may_hold_anything(form, shape):
    """-1 stands for no key: a NaN in row 0, which no row selects, must not pass."""
    case = Case(form, shape, torch.float32)
    case.idx[case.idx == 0] = -1
    case.kv[0] = torch.nan
    out, lse, target = case.forward()
    assert out.isfinite().all() and target.isfinite().all()
    d_q, d_kv = case.backward_of(out, lse)
    assert d_q.isfinite().all() and d_kv.isfinite().all() and d_kv[0].eq(0).all()


@pytest.mark.parametrize("entries", [37, 1])  # one entry: its logit is the lse, far below 0 for some heads
@pytest.mark.parametrize(("form", "shape"), ONE_EACH)
def test_large_logits_stay_finite(form, shape, entries):
    case = Case(form, shape, torch.float32)
    case.q *= 300
    case.idx[1:, 0], case.idx[:, entries:] = 4, -1
    out, lse, target = case.forward()
    assert out.isfinite().all() and lse[1:].isfinite().all() and target.isfinite().all()
    d_q, d_kv = case.backward_of(out, lse)
    assert d_q.isfinite().all() and d_kv.isfinite().all()


@pytest.mark.parametrize(("form", "shape"), ONE_EACH)
def test_repeats_are_bitwise_equal(form, shape):
    case = Case(form, shape, torch.bfloat16)
    first, again = ([*case.forward(), *case.backward(deterministic=True)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(case.backward()[0], first[3])  # d_q does not depend on the mode
    parts = [*case.backward(deterministic=True, workspace=1)]
    assert torch.equal(parts[0], first[3])  # nor on how the rows are cut


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
