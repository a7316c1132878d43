"""The sparse-stage loss over S_t: value and gradients against the brute-force reference, and against the dense loss."""

import pytest
import torch
import torch.nn.functional as F

from model.ops.index_kl_dense import reference as dense_ref
from model.ops.index_kl_selected import index_kl_selected as op
from model.ops.index_kl_selected import reference as ref
from model.ops.index_topk.reference import index_scores, index_topk
from model.ops.sparse_mla.reference import sparse_mla
from tests.model.ops.cases import LAYOUTS, LargestTensor, assert_close, layout, make_doc_start, randn

SCALE, HEADS, DIM, VALUE_DIM = 0.35, 3, 6, 4
BLOCKS = [None, 1, 7, 1000]


def index_kl_selected(q, kv, lse, idx, scale, *index, **options):
    """The op on the target that attention with this log-sum-exp gives its selected positions."""
    rows = kv[idx.clamp(min=0).long()]
    share = torch.einsum("thd,tkd->thk", q, rows) * scale - lse.masked_fill(lse.isneginf(), 0.0)[..., None]
    target = share.exp().masked_fill((idx < 0)[:, None], 0.0).mean(1).detach()
    return op(target, idx, *index, **options)


def make_inputs(seed: int, doc_start, topk: int, dtype: torch.dtype = torch.float64):
    """(q, kv, lse, idx, scale) and (q_index, k_index, w); the selection is the indexer's own, as in training."""
    rows = len(doc_start)
    shapes = (rows, HEADS, DIM), (rows, DIM), (rows, 4, 5), (rows, 5), (rows, 4)
    q, kv, q_index, k_index, w = randn(seed, *shapes, dtype=dtype)
    idx = index_topk(q_index, k_index, w, doc_start, topk)
    lse = sparse_mla(q, kv, idx, SCALE, VALUE_DIM)[1].detach()
    return (q, kv, lse, idx, SCALE), [q_index, k_index, w]


def row_by_row(attention, index):
    """[T] KL over the selected entries alone, gathered: no mask anywhere, and no use of lse."""
    q, kv, _, idx, _ = attention
    scores, kl = index_scores(*index), []
    for t in range(q.shape[0]):
        chosen = idx[t][idx[t] >= 0]
        if len(chosen) == 0:
            kl.append(torch.zeros((), dtype=q.dtype))
            continue
        target = (q[t] @ kv[chosen].T * SCALE).softmax(-1).mean(0).detach()
        kl.append(F.kl_div(scores[t, chosen].log_softmax(0), target, reduction="sum"))
    return torch.stack(kl)


@pytest.mark.parametrize("name", LAYOUTS)
def test_reference_is_the_definition(name):
    attention, index = make_inputs(0, layout(name), 5)
    found, expected = ref.index_kl_selected(*attention, *index), row_by_row(attention, index)
    assert_close(found.kl, expected)
    if name != "all_padding":
        mine, hand = (torch.autograd.grad(kl.sum(), index) for kl in (found.kl, expected))
        for a, b in zip(mine, hand, strict=True):
            assert_close(a, b)


def test_reference_gradients_by_finite_differences():
    attention, index = make_inputs(1, make_doc_start((6, 1), padding=1), 3)
    assert torch.autograd.gradcheck(lambda *a: ref.index_kl_selected(*attention, *a).kl, index)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("topk", [1, 9, 100])
@pytest.mark.parametrize("name", LAYOUTS)
def test_streaming_equals_reference(name, topk, block, dtype):
    doc_start = layout(name)
    attention, index = make_inputs(2, doc_start, topk, dtype)
    found = index_kl_selected(*attention, *index, stats=True, block=block)
    expected = ref.index_kl_selected(*attention, *index)
    if topk == 1:  # one position: nothing to learn, whatever rounding says
        assert abs(found.kl_sum) < 1e-4 and expected.kl.abs().max() < 1e-4
        return
    assert_close(found.kl_sum, expected.kl.sum())
    assert_close(found.stats["kl_uniform"], expected.kl_uniform.sum())
    assert found.stats["rows"] == (doc_start <= torch.arange(len(doc_start))).sum()
    mine = torch.autograd.grad(2.5 * found.kl_sum, index)
    for position, (a, b) in enumerate(zip(mine, torch.autograd.grad(2.5 * expected.kl.sum(), index), strict=True)):
        assert_close(a, b, f"gradient of input {position}")


@pytest.mark.parametrize("topk", [59, 80])
def test_equals_the_dense_loss_when_everything_is_selected(topk):
    doc_start = make_doc_start((25, 1, 30), padding=3)
    attention, index = make_inputs(3, doc_start, topk)
    q, kv = attention[:2]
    found = index_kl_selected(*attention, *index, stats=True)
    dense = dense_ref.index_kl_dense(q, kv[:, None].expand(-1, HEADS, -1), SCALE, *index, doc_start)
    assert_close(found.kl_sum, dense.kl.sum())
    assert_close(found.stats["kl_uniform"], dense.kl_uniform.sum())
    pairs = zip(torch.autograd.grad(found.kl_sum, index), torch.autograd.grad(dense.kl.sum(), index), strict=True)
    for a, b in pairs:
        assert_close(a, b)


def test_the_student_is_normalised_over_the_selection():
    """A student over all visible positions against this target is another number, and a larger one."""
    doc_start = make_doc_start((50,))
    attention, index = make_inputs(4, doc_start, 8)
    q, kv, lse, idx, _ = attention
    allowed = dense_ref.visible(doc_start)
    log_student = index_scores(*index).masked_fill(~allowed, -torch.inf).log_softmax(-1)
    target = (torch.einsum("thd,sd->ths", q, kv) * SCALE - lse[..., None]).exp().mean(1)
    chosen = idx.clamp(min=0)
    target = target.gather(1, chosen).masked_fill(idx < 0, 0.0)
    wrong = (torch.xlogy(target, target) - target * log_student.gather(1, chosen).masked_fill(idx < 0, 0.0)).sum()
    assert_close(target.sum(1), torch.ones(50))
    assert wrong > index_kl_selected(*attention, *index).kl_sum + 1.0


def test_gradients_reach_the_indexer_alone():
    attention, index = make_inputs(5, make_doc_start((20,), padding=2), 6)
    index_kl_selected(*attention, *index).kl_sum.backward()
    assert attention[0].grad is None and attention[1].grad is None
    for t in index:
        assert t.grad is not None and t.grad.isfinite().all()
        assert t.grad[20:].eq(0).all() and t.grad[:20].ne(0).any()


def test_packed_equals_apart():
    lengths = (21, 1, 33)
    (q, kv, lse, idx, _), index = make_inputs(6, make_doc_start(lengths, padding=5), 7)
    packed = index_kl_selected(q, kv, lse, idx, SCALE, *index, block=16).kl_sum
    apart, start = torch.zeros((), dtype=torch.float64), 0
    for length in lengths:
        part = slice(start, start + length)
        local = torch.where(idx[part] < 0, -1, idx[part] - start)
        apart = apart + index_kl_selected(q[part], kv[part], lse[part], local, SCALE, *(t[part] for t in index)).kl_sum
        start += length
    assert_close(packed, apart)
    for a, b in zip(torch.autograd.grad(packed, index), torch.autograd.grad(apart, index), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("block", [None, 16])
def test_memory_does_not_grow_with_the_square(block):
    rows = 2048
    generator = torch.Generator().manual_seed(7)
    q, kv, *index = randn(7, (rows, HEADS, DIM), (rows, DIM), (rows, 4, 5), (rows, 5), (rows, 4), dtype=torch.float32)
    idx = torch.rand(rows, 16, generator=generator).mul(torch.arange(1, rows + 1)[:, None]).long().sort(dim=1).values
    idx[1:][idx[1:] == idx[:-1]] = -1
    lse = torch.full((rows, HEADS), 3.0)
    with LargestTensor() as largest:
        index_kl_selected(q, kv, lse, idx, SCALE, *index, stats=True, block=block).kl_sum.backward()
    assert 0 < largest.elements < rows * rows
    assert index[0].grad is not None
