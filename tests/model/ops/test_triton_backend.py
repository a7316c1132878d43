"""The public ops with backend="triton" against backend="torch": every output and gradient, packed, ranks' rectangles,
workspaces from one row up. The kernels themselves are tested apart; here it is the glue around them that may fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.model.ops.cases import integers, make_doc_start, randn
from tests.model.ops.interpreter import DEVICE, poison_allocations

from model.ops.index_kl_dense import index_kl_dense  # isort: skip  (after the helper: it chooses the interpreter)
from model.ops.index_kl_selected import index_kl_selected  # isort: skip
from model.ops.index_topk import index_topk  # isort: skip
from model.ops.mla_dense import mla_dense_lse  # isort: skip
from model.ops.settings import OpSettings  # isort: skip
from model.ops.sparse_mla import sparse_mla  # isort: skip

DOC_START = make_doc_start((9, 1, 23), padding=3).to(DEVICE)
ROWS = len(DOC_START)
RECTANGLES = {"whole": None, "late": torch.arange(14, ROWS), "zigzag": torch.tensor([*range(6), *range(25, ROWS)])}
WORKSPACES = [1, 1 << 13]  # one row at a time; several and a remainder
# fp32: other orders of summation. bf16: the inputs are the same, but Triton also rounds the absorbed queries (2^-9 of
# logits of about 5: 1% of a probability), one factor of each product, and the outputs.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-5}
DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy, where the interpreter masks afterwards


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    poison_allocations(monkeypatch)


def inputs(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [t.detach().to(DEVICE).requires_grad_() for t in randn(seed, *shapes, dtype=dtype)]


def assert_near(mine: Tensor, torchs: Tensor, dtype: torch.dtype, what: str) -> None:
    assert mine.shape == torchs.shape and mine.isnan().sum() == 0, what
    finite = torchs.isfinite()
    assert torch.equal(mine[~finite].double(), torchs[~finite].double()), what
    a, b = mine.detach()[finite].double(), torchs.detach()[finite].double()
    limit = TOLERANCE[dtype] * max(0.1, b.abs().max().item() if b.numel() else 0.0)
    assert b.numel() == 0 or (a - b).abs().max() <= limit, f"{what}: {(a - b).abs().max():.2e} above {limit:.2e}"


def compare(run: Callable[[OpSettings], dict[str, Tensor]], workspace: int, dtype: torch.dtype, **options) -> None:
    """`run` gives named results, which must agree between the backends."""
    mine = run(OpSettings("triton", workspace, **options))
    for name, value in run(OpSettings("torch")).items():
        assert_near(mine[name], value, dtype, name)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("rectangle", RECTANGLES)
@pytest.mark.parametrize("workspace", [1, 1 << 16])
def test_index_topk(workspace, rectangle, fp8):
    """Small whole numbers: exact in every precision and full of ties, so the sets must be equal entry for entry."""
    q, k, w = (t.to(DEVICE) for t in integers(1, (ROWS, 3, 16), (ROWS, 16), (ROWS, 3)))
    at = RECTANGLES[rectangle]
    at = torch.arange(ROWS) if at is None else at
    found = [
        index_topk(q[at], k, w[at], DOC_START[at], 5, at.to(DEVICE), OpSettings(backend, workspace, fp8_index=fp8))
        for backend in ("triton", "torch")
    ]
    assert found[0].dtype == found[1].dtype == torch.int32
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rectangle", RECTANGLES)
def test_mla_dense_lse(rectangle, dtype):
    q, k, v = (t.detach() for t in inputs(2, (ROWS, 3, 12), (ROWS, 3, 12), (ROWS, 3, 7), dtype=dtype))
    at = RECTANGLES[rectangle]
    at = torch.arange(ROWS) if at is None else at

    def run(settings: OpSettings) -> dict[str, Tensor]:
        out, lse = mla_dense_lse(q[at], k, v, DOC_START[at], 0.4, at.to(DEVICE), settings)
        assert out.dtype == dtype and lse.dtype == torch.float32
        return {"out": out, "lse": lse}

    compare(run, 1 << 20, dtype)


def test_dense_products_run_in_the_queries_dtype():
    """Under autocast a product is bf16 and a norm fp32, and what is put together of both is fp32."""
    shapes = (ROWS, 3, 12), (ROWS, 3, 12), (ROWS, 3, 7), (ROWS, 4, 16), (ROWS, 16), (ROWS, 4)
    q, k, v, q_index, k_index, w = (t.detach() for t in inputs(11, *shapes, dtype=torch.bfloat16))
    settings, found = OpSettings("triton"), []
    for dtype in (torch.bfloat16, torch.float32):
        keys = k.to(dtype), v.to(dtype)
        out, lse = mla_dense_lse(q, *keys, DOC_START, 0.4, torch.arange(ROWS).to(DEVICE), settings)
        again, kl = index_kl_dense(
            q, *keys, 0.4, q_index, k_index.to(dtype), w.float(), DOC_START, settings=settings
        )  # fmt: skip
        assert again is not None
        found.append((out, lse, again, kl.kl_sum))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("rectangle", RECTANGLES)
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_index_kl_dense(workspace, rectangle, values, dtype):
    shapes = (ROWS, 3, 12), (ROWS, 3, 12), (ROWS, 3, 7), (ROWS, 4, 16), (ROWS, 16), (ROWS, 4)
    q, k, v, *index = inputs(3, *shapes, dtype=dtype)
    at = RECTANGLES[rectangle]
    q_pos = None if at is None else at.to(DEVICE)
    at = torch.arange(ROWS) if at is None else at

    def run(settings: OpSettings) -> dict[str, Tensor]:
        out, found = index_kl_dense(
            q[at], k, v if values else None, 0.4, index[0][at], index[1], index[2][at].float(), DOC_START[at], 4, q_pos,
            settings,
        )  # fmt: skip
        named = dict(zip(("d_q", "d_k", "d_w"), torch.autograd.grad(2.5 * found.kl_sum, index), strict=True))
        assert (out is not None) == values
        named |= {"out": out} if out is not None else {}
        # rounding may swap two keys on the border of the top-k: of a mass, that is a small part
        return named | {"kl": found.kl_sum, "kl_uniform": found.stats["kl_uniform"], "rows": found.stats["rows"]}

    compare(run, workspace, dtype)


@pytest.mark.parametrize("rectangle", ["whole", "zigzag"])
def test_index_kl_dense_row_by_row(rectangle):
    """In fp32, where these inputs have no two scores so near that rounding would swap them."""
    q, k, *index = inputs(4, (ROWS, 3, 12), (ROWS, 3, 12), (ROWS, 4, 16), (ROWS, 16), (ROWS, 4), dtype=torch.float32)
    at = RECTANGLES[rectangle]
    q_pos, at = (None, torch.arange(ROWS)) if at is None else (at.to(DEVICE), at)

    def run(settings: OpSettings) -> dict[str, Tensor]:
        rows = index_kl_dense(
            q[at], k, None, 0.4, index[0][at], index[1], index[2][at], DOC_START[at], None, q_pos, settings,
            row_topk=(2, 5),
        )[1].stats["by_row"]  # fmt: skip
        return {
            f"{name} of {place}": rows[place, i] for place in (0, 1) for i, name in enumerate(("p", "best", "both"))
        }

    compare(run, WORKSPACES[1], torch.float32)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize(("heads", "latent", "rope"), [(3, 16, 8), (16, 64, 16)])
def test_sparse_mla(heads, latent, rope, workspace, dtype, deterministic):
    """The second geometry is, in bf16, that of the form which writes P."""
    shapes = (ROWS, heads, 6), (ROWS, heads, rope), (heads, 6, latent), (ROWS, latent), (ROWS, rope)
    tensors = inputs(4, *shapes, dtype=dtype)
    q, k, w = (t.to(DEVICE) for t in integers(5, (ROWS, 3, 4), (ROWS, 4), (ROWS, 3)))
    idx = index_topk(q, k, w, DOC_START, 7)
    upstream = torch.randn(ROWS, heads, latent, generator=torch.Generator().manual_seed(6)).to(DEVICE)

    def run(settings: OpSettings) -> dict[str, Tensor]:
        found = sparse_mla(*tensors, idx, 0.35, target=True, settings=settings)
        assert found.target is not None
        names = ("d_q_nope", "d_q_rope", "d_w_uk", "d_latent", "d_k_rope")
        gradients = torch.autograd.grad((found.out * upstream).sum(), tensors)
        return {"out": found.out, "lse": found.lse, "target": found.target} | dict(zip(names, gradients, strict=True))

    compare(run, workspace, dtype, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_index_kl_selected(workspace, dtype, deterministic):
    index = inputs(7, (ROWS, 4, 16), (ROWS, 16), (ROWS, 4), dtype=dtype)
    idx = index_topk(*(t.detach() for t in index), DOC_START, 7)
    (logits,) = inputs(8, tuple(idx.shape), dtype=torch.float32)
    target = logits.detach().masked_fill(idx < 0, -torch.inf).softmax(-1).nan_to_num(0.0)

    def run(settings: OpSettings) -> dict[str, Tensor]:
        found = index_kl_selected(target, idx, index[0], index[1], index[2].float(), True, settings)
        named = dict(zip(("d_q", "d_k", "d_w"), torch.autograd.grad(2.5 * found.kl_sum, index), strict=True))
        return named | {"kl": found.kl_sum, **found.stats}

    compare(run, workspace, dtype, deterministic=deterministic)


def test_twenty_repeats_are_equal():
    """The whole of a sparse layer in deterministic mode."""
    settings = OpSettings("triton", 1 << 10, deterministic=True)
    doc_start, rows = make_doc_start((5, 4)).to(DEVICE), 9
    tensors = inputs(9, (rows, 2, 6), (rows, 2, 8), (2, 6, 16), (rows, 16), (rows, 8), dtype=torch.float32)
    index = inputs(10, (rows, 2, 16), (rows, 16), (rows, 2), dtype=torch.float32)

    def run() -> list[Tensor]:
        idx = index_topk(*(t.detach() for t in index), doc_start, 3, settings=settings)
        found = sparse_mla(*tensors, idx, 0.35, target=True, settings=settings)
        assert found.target is not None
        kl = index_kl_selected(found.target, idx, *index, settings=settings).kl_sum
        gradients = torch.autograd.grad(found.out.square().sum() + kl, [*tensors, *index])
        return [idx, found.out.detach(), found.lse, found.target, kl.detach(), *gradients]

    first = run()
    assert all(torch.equal(a, b) for _ in range(19) for a, b in zip(first, run(), strict=True))
