"""Attention over selected latents: reference against dense attention, streaming against reference, absorbed form."""

import pytest
import torch
from torch import Tensor

from model.ops.index_topk import index_topk
from model.ops.mla_dense import mla_dense
from model.ops.mla_dense import reference as dense_ref
from model.ops.settings import OpSettings
from model.ops.sparse_mla import reference as ref
from model.ops.sparse_mla import sparse_mla as op
from tests.model.ops.cases import (
    LAYOUTS,
    LargestTensor,
    assert_close,
    assert_same_gradients,
    layout,
    make_doc_start,
    randn,
)

SCALE, VALUE_DIM, DIM, HEADS = 0.35, 5, 8, 3
BLOCKS = [None, 1, 7, 1000]


def sparse_mla(q: Tensor, kv: Tensor, idx: Tensor, scale: float, value_dim: int, **options) -> tuple[Tensor, Tensor]:
    """The op on queries that are in the latent space already: W_UK is the identity."""
    w_uk = torch.eye(value_dim, dtype=q.dtype).expand(q.shape[1], -1, -1)
    split = q[..., :value_dim], q[..., value_dim:], w_uk, kv[:, :value_dim], kv[:, value_dim:]
    found = op(*split, idx, scale, **options)
    return found.out, found.lse


def select(seed: int, doc_start: Tensor, topk: int) -> Tensor:
    q, k, w = (t.detach() for t in randn(seed, (len(doc_start), 2, 4), (len(doc_start), 4), (len(doc_start), 2)))
    return index_topk(q, k, w, doc_start, topk)


def make_inputs(seed: int, rows: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return randn(seed, (rows, HEADS, DIM), (rows, DIM), dtype=dtype)


@pytest.mark.parametrize("name", LAYOUTS)
def test_reference_is_dense_attention_when_everything_is_selected(name):
    doc_start = layout(name)
    rows = len(doc_start)
    q, kv = make_inputs(0, rows)
    out, lse = ref.sparse_mla(q, kv, select(1, doc_start, rows), SCALE, VALUE_DIM)
    k = kv[:, None].expand(-1, HEADS, -1)
    assert_close(out, dense_ref.mla_dense(q, k, k[..., :VALUE_DIM], doc_start, SCALE))
    for t, start in enumerate(doc_start.tolist()):
        assert_close(lse[t], (q[t] @ kv[start : t + 1].T * SCALE).logsumexp(-1))  # of nothing: -inf


def test_reference_attends_to_the_selected_rows_alone():
    doc_start = make_doc_start((20,))
    q, kv = make_inputs(2, 20)
    idx = select(3, doc_start, 4)
    out, lse = ref.sparse_mla(q, kv, idx, SCALE, VALUE_DIM)
    for t in range(20):
        rows = kv[idx[t][idx[t] >= 0]]
        logits = q[t] @ rows.T * SCALE
        assert_close(out[t], logits.softmax(-1) @ rows[:, :VALUE_DIM])
        assert_close(lse[t], logits.logsumexp(-1))


@pytest.mark.parametrize("form", [ref.sparse_mla, sparse_mla])
def test_gradients_by_finite_differences(form):
    doc_start = make_doc_start((5, 1), padding=1)
    idx = select(4, doc_start, 3)
    assert torch.autograd.gradcheck(lambda *a: form(*a, idx, SCALE, 2)[0], randn(5, (7, 2, 3), (7, 3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("topk", [1, 9, 200])
@pytest.mark.parametrize("name", LAYOUTS)
def test_streaming_equals_reference(name, topk, block, dtype):
    doc_start = layout(name)
    inputs = make_inputs(6, len(doc_start), dtype)
    idx = select(7, doc_start, topk)
    out, lse = sparse_mla(*inputs, idx, SCALE, VALUE_DIM, block=block)
    expected, expected_lse = ref.sparse_mla(*inputs, idx, SCALE, VALUE_DIM)
    assert_close(out, expected)
    assert_close(lse, expected_lse)
    assert not lse.requires_grad
    assert_same_gradients(
        lambda *a: sparse_mla(*a, idx, SCALE, VALUE_DIM, block=block)[0],
        lambda *a: ref.sparse_mla(*a, idx, SCALE, VALUE_DIM)[0],
        inputs,
    )


def test_rows_that_select_nothing():
    """Out 0, lse -inf and no gradient, wherever they stand; position 0, which stands in for -1, gets none."""
    idx = torch.tensor([[-1, -1], [1, -1], [-1, -1], [1, 3]])
    inputs = make_inputs(8, 4)
    out, lse = sparse_mla(*inputs, idx, SCALE, VALUE_DIM)
    assert out[[0, 2]].eq(0).all() and lse[[0, 2]].isneginf().all()
    d_q, d_kv = torch.autograd.grad(out.sum() + out.square().sum(), inputs)
    assert d_q[[0, 2]].eq(0).all() and d_kv[[0, 2]].eq(0).all()
    assert d_q[3].ne(0).any() and d_kv[[1, 3]].ne(0).any(dim=1).all()


def test_order_of_the_selection_does_not_matter():
    doc_start = make_doc_start((40,))
    inputs = make_inputs(9, 40)
    idx = select(10, doc_start, 8)
    shuffled = idx[:, torch.randperm(8, generator=torch.Generator().manual_seed(0))]
    assert_same_gradients(
        lambda *a: sparse_mla(*a, shuffled, SCALE, VALUE_DIM)[0],
        lambda *a: sparse_mla(*a, idx, SCALE, VALUE_DIM)[0],
        inputs,
    )


def test_fewer_queries_than_keys():
    """Decoding: one new query over a cache."""
    q, kv = randn(11, (1, HEADS, DIM), (30, DIM))
    idx = torch.tensor([[0, 4, 5, 29, -1]])
    out, _ = sparse_mla(q, kv, idx, SCALE, VALUE_DIM)
    assert_close(out, ref.sparse_mla(q, kv, idx, SCALE, VALUE_DIM)[0])


def test_large_finite_logits_stay_finite():
    doc_start = make_doc_start((30,), padding=2)
    q, kv = (t.detach().mul(300).requires_grad_() for t in make_inputs(12, 32, torch.float32))
    out, lse = sparse_mla(q, kv, select(13, doc_start, 5), SCALE, VALUE_DIM)
    assert out.isfinite().all() and lse[:30].isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, kv)))


def absorbed(q_nope, q_rope, latent, k_rope, w_uk, w_uv, idx) -> Tensor:
    """Sparse form: queries go down to the latent space, the output comes up from it."""
    out = op(q_nope, q_rope, w_uk, latent, k_rope, idx, SCALE).out
    return torch.einsum("thc,hvc->thv", out, w_uv)


def decompressed(q_nope, q_rope, latent, k_rope, w_uk, w_uv, doc_start) -> Tensor:
    """Dense form: keys and values of every head come up from the latent space."""
    k_nope = torch.einsum("tc,hnc->thn", latent, w_uk)
    k = torch.cat([k_nope, k_rope[:, None].expand(-1, HEADS, -1)], dim=-1)
    v = torch.einsum("tc,hvc->thv", latent, w_uv)
    return mla_dense(torch.cat([q_nope, q_rope], dim=-1), k, v, doc_start, SCALE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dense_equals_sparse_when_topk_covers_the_sequence(dtype):
    """Forward and the gradients of all six inputs, through the absorbed up-projections."""
    doc_start = make_doc_start((25, 1, 30), padding=3)
    rows, nope, rope, latent, value = 59, 6, 4, 7, 5
    inputs = randn(
        14,
        (rows, HEADS, nope),
        (rows, HEADS, rope),
        (rows, latent),
        (rows, rope),
        (HEADS, nope, latent),
        (HEADS, value, latent),
        dtype=dtype,
    )
    for topk in (rows, rows + 5):
        idx = select(15, doc_start, topk)
        assert_close(absorbed(*inputs, idx), decompressed(*inputs, doc_start))
        assert_same_gradients(lambda *a, idx=idx: absorbed(*a, idx), lambda *a: decompressed(*a, doc_start), inputs)
    narrow = absorbed(*inputs, select(15, doc_start, 8))
    assert (narrow - decompressed(*inputs, doc_start)).abs().max() > 0.01  # the selection does bind below that


@pytest.mark.parametrize("workspace", [1, 1 << 12, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_absorption_block_by_block_equals_absorption_at_once(dtype, workspace):
    """Any workspace, down to one row a chunk, gives every gradient of the op's own W_UK, rope and latent parts."""
    doc_start = make_doc_start((25, 1, 14), padding=3)
    inputs = randn(18, (43, HEADS, 6), (43, HEADS, 4), (HEADS, 6, 7), (43, 7), (43, 4), dtype=dtype)
    idx = select(19, doc_start, 9)

    def at_once(q_nope, q_rope, w_uk, latent, k_rope) -> Tensor:
        q = torch.cat([torch.einsum("thn,hnc->thc", q_nope, w_uk), q_rope], dim=-1)
        return ref.sparse_mla(q, torch.cat([latent, k_rope], dim=-1), idx, SCALE, 7)[0]

    settings = OpSettings(workspace=workspace)
    assert_close(op(*inputs, idx, SCALE, settings=settings).out, at_once(*inputs))
    assert_same_gradients(lambda *a: op(*a, idx, SCALE, settings=settings).out, at_once, inputs)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_target_is_the_mean_of_the_heads_probabilities(name):
    doc_start = layout(name)
    q, kv = make_inputs(20, len(doc_start))
    idx = select(21, doc_start, 9)
    w_uk = torch.eye(VALUE_DIM, dtype=q.dtype).expand(HEADS, -1, -1)
    parts = q[..., :VALUE_DIM], q[..., VALUE_DIM:], w_uk, kv[:, :VALUE_DIM], kv[:, VALUE_DIM:]
    target = op(*parts, idx, SCALE, target=True).target
    chosen = idx.clamp(min=0).long()[:, None].expand(-1, HEADS, -1)
    logits = torch.einsum("thd,sd->ths", q, kv).mul(SCALE).gather(2, chosen)
    empty = (idx < 0)[:, None]
    share = (logits - logits.masked_fill(empty, -torch.inf).logsumexp(-1, keepdim=True)).exp()
    assert target is not None and not target.requires_grad
    assert_close(target, share.masked_fill(empty, 0.0).mean(1).nan_to_num(0.0))
    assert op(*parts, idx, SCALE).target is None


def test_saved_for_backward_is_neither_absorbed_nor_gathered():
    """Nothing of [T, H, C + rope] beside the output, nothing of [T, k, C], and no probabilities."""
    rows, latent = 64, 32
    inputs = randn(22, (rows, HEADS, 4), (rows, HEADS, 2), (HEADS, 4, latent), (rows, latent), (rows, 2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        op(*inputs, select(23, make_doc_start((rows,)), 16), SCALE, target=True)
    made = [(rows, 16), (rows, HEADS, latent), (rows, HEADS)]  # indices, output, log-sum-exp
    assert sorted(saved) == sorted([*(tuple(t.shape) for t in inputs), *made])


def test_twenty_repeats_are_equal():
    inputs = randn(24, (200, HEADS, 4), (200, HEADS, 2), (HEADS, 4, 8), (200, 8), (200, 2), dtype=torch.float32)
    idx = select(25, make_doc_start((150, 50)), 16)

    def run() -> list[Tensor]:
        out = op(*inputs, idx, SCALE).out
        return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]

    first = run()
    assert all(torch.equal(a, b) for _ in range(19) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("block", [None, 16])
def test_memory_does_not_grow_with_the_square(block):
    rows = 2048
    inputs = make_inputs(16, rows, torch.float32)
    idx = select(17, make_doc_start((rows,)), 16)
    with LargestTensor() as largest:
        sparse_mla(*inputs, idx, SCALE, VALUE_DIM, block=block)[0].sum().backward()
    assert 0 < largest.elements < rows * rows
    assert all(t.grad is not None for t in inputs)
