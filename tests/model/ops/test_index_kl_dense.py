"""The dense warm-up loss: value, gradients and statistics against the brute-force reference."""

import pytest
import torch
import torch.nn.functional as F

from model.ops.index_kl_dense import index_kl_dense as op
from model.ops.index_kl_dense import reference as ref
from model.ops.index_topk.reference import index_scores, index_topk
from model.ops.mla_dense import reference as attention_ref
from tests.model.ops.cases import BLOCKS, LAYOUTS, LargestTensor, assert_close, layout, make_doc_start, randn

SCALE = 0.35


def index_kl_dense(q, k, scale, *rest, **options):
    """The loss alone, without attention's output."""
    out, found = op(q, k, None, scale, *rest, **options)
    assert out is None
    return found


def make_inputs(seed: int, rows: int, dtype: torch.dtype = torch.float64, heads: int = 3, index_heads: int = 4):
    q, k, *index = randn(
        seed, (rows, heads, 6), (rows, heads, 6), (rows, index_heads, 5), (rows, 5), (rows, index_heads), dtype=dtype
    )
    return q, k, index


def row_by_row(q, k, index, doc_start):
    """[T] KL(p || softmax(I)), one row at a time over the visible positions alone: no mask anywhere."""
    scores, kl = index_scores(*index), []
    for t, start in enumerate(doc_start.tolist()):
        seen = slice(start, t + 1)
        if start > t:
            kl.append(torch.zeros((), dtype=q.dtype))
            continue
        heads = torch.stack([(k[seen, h] @ q[t, h] * SCALE).softmax(0) for h in range(q.shape[1])])
        target = (heads.sum(0) / heads.sum()).detach()
        kl.append(F.kl_div(scores[t, seen].log_softmax(0), target, reduction="sum"))
    return torch.stack(kl)


@pytest.mark.parametrize("name", LAYOUTS)
def test_reference_is_the_definition(name):
    doc_start = layout(name)
    q, k, index = make_inputs(0, len(doc_start))
    found = ref.index_kl_dense(q, k, SCALE, *index, doc_start, topk=5)
    expected = row_by_row(q, k, index, doc_start)
    assert_close(found.kl, expected)
    assert all(t.isfinite().all() for t in found)
    if name != "all_padding":
        mine, hand = (torch.autograd.grad(kl.sum(), index) for kl in (found.kl, expected))
        for a, b in zip(mine, hand, strict=True):
            assert_close(a, b)


def test_reference_gradients_by_finite_differences():
    doc_start = make_doc_start((5, 1), padding=1)
    q, k, index = make_inputs(1, 7)
    assert torch.autograd.gradcheck(lambda *a: ref.index_kl_dense(q, k, SCALE, *a, doc_start).kl, index)


def test_reference_gradient_of_the_scores_is_student_minus_target():
    doc_start = make_doc_start((9,))
    p, scores = randn(2, (9, 9), (9, 9))
    allowed = ref.visible(doc_start)
    p = p.masked_fill(~allowed, -torch.inf).softmax(-1).detach()
    kl, _ = ref.kl_rows(p, scores, allowed)
    (gradient,) = torch.autograd.grad(kl.sum(), scores)
    assert_close(gradient, scores.masked_fill(~allowed, -torch.inf).softmax(-1) - p)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("block", [None, *BLOCKS])
@pytest.mark.parametrize("name", LAYOUTS)
def test_streaming_equals_reference(name, block, dtype):
    doc_start = layout(name)
    rows, topk = len(doc_start), 6
    q, k, index = make_inputs(3, rows, dtype)
    found = index_kl_dense(q, k, SCALE, *index, doc_start, topk=topk, block=block)
    expected = ref.index_kl_dense(q, k, SCALE, *index, doc_start, topk=topk)
    assert_close(found.kl_sum, expected.kl.sum())
    assert expected.mass is not None and expected.oracle_mass is not None
    assert_close(found.stats["kl_uniform"], expected.kl_uniform.sum())  # rows that see one token or none add 0
    assert_close(found.stats["mass"], expected.mass.sum())
    assert_close(found.stats["oracle_mass"], expected.oracle_mass.sum())
    assert found.stats["rows"] == (doc_start <= torch.arange(rows)).sum()
    # Scaled, because backward only scales gradients made beforehand.
    mine = torch.autograd.grad(2.5 * found.kl_sum, index)
    for position, (a, b) in enumerate(zip(mine, torch.autograd.grad(2.5 * expected.kl.sum(), index), strict=True)):
        assert_close(a, b, f"gradient of input {position}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("block", [None, *BLOCKS])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_selections_are_worth_row_by_row(name, block, dtype):
    doc_start = layout(name)
    q, k, index = make_inputs(20, len(doc_start), dtype)
    sizes = (1, 6, 1000)
    found = index_kl_dense(q, k, SCALE, *index, doc_start, block=block, row_topk=sizes).stats["by_row"]
    assert found.shape == (3, 3, len(doc_start))
    for rows, topk in zip(found, sizes, strict=True):
        expected = ref.index_kl_dense(q, k, SCALE, *index, doc_start, topk=topk)
        for mine, theirs in zip(rows, (expected.mass, expected.oracle_mass, expected.shared), strict=True):
            assert_close(mine, theirs.to(mine.dtype))


def test_the_overlap_is_counted_by_hand():
    """Row by row with sets, in words that share nothing with the code."""
    doc_start = make_doc_start((7, 20), padding=2)
    q, k, index = make_inputs(21, 29)
    found = index_kl_dense(q, k, SCALE, *index, doc_start, row_topk=(4,)).stats["by_row"][0, 2]
    scores, p = (
        t.detach() for t in (index_scores(*index), attention_ref.attention_probs(q, k, doc_start, SCALE).mean(0))
    )
    for t, start in enumerate(doc_start.tolist()):
        seen = range(start, t + 1)
        mine = set(sorted(seen, key=lambda s: (-float(scores[t, s]), s))[:4])  # noqa: B023
        best = set(sorted(seen, key=lambda s: (-float(p[t, s]), s))[:4])  # noqa: B023
        assert found[t] == len(mine & best)


def test_no_gradient_reaches_the_target():
    q, k, index = make_inputs(4, 20)
    index_kl_dense(q, k, SCALE, *index, make_doc_start((20,))).kl_sum.backward()
    assert q.grad is None and k.grad is None
    assert all(t.grad is not None and t.grad.ne(0).any() for t in index)


def test_an_indexer_without_information_scores_the_uniform_reference():
    q, k, index = make_inputs(5, 40)
    doc_start = make_doc_start((12, 1, 24), padding=3)
    found = index_kl_dense(q, k, SCALE, *index[:2], torch.zeros_like(index[2]), doc_start, topk=4)
    assert_close(found.kl_sum, found.stats["kl_uniform"])
    assert found.kl_sum > 0.5


def test_a_perfect_indexer_has_neither_loss_nor_gradient():
    """One head of non-negative logits is within the indexer's reach: relu(q.k) = q.k."""
    rows = 30
    q, k = (t.detach().abs() for t in randn(6, (rows, 1, 5), (rows, 1, 5)))
    index = [t.clone().requires_grad_() for t in (q, k[:, 0], torch.full((rows, 1), SCALE, dtype=torch.float64))]
    found = index_kl_dense(q, k, SCALE, *index, make_doc_start((rows - 4, 4)), topk=5)
    assert abs(found.kl_sum.item()) < 1e-12
    assert_close(found.stats["mass"], found.stats["oracle_mass"])
    assert max(g.abs().max().item() for g in torch.autograd.grad(found.kl_sum, index)) < 1e-12


def test_packed_equals_apart():
    lengths = (21, 1, 33)
    q, k, index = make_inputs(7, 60)
    packed = index_kl_dense(q, k, SCALE, *index, make_doc_start(lengths, padding=5), block=16)
    together = torch.autograd.grad(packed.kl_sum, index)
    apart, start = torch.zeros((), dtype=torch.float64), 0
    for length in lengths:
        part = slice(start, start + length)
        pieces = [t[part] for t in index]
        apart = apart + index_kl_dense(q[part], k[part], SCALE, *pieces, make_doc_start((length,))).kl_sum
        start += length
    assert_close(packed.kl_sum, apart)
    for a, b in zip(together, torch.autograd.grad(apart, index), strict=True):
        assert_close(a, b)
        assert a[start:].eq(0).all()  # padding contributes nothing


def test_the_loss_covers_every_visible_position():
    """Not only the indexer's own top-k, which would confirm itself: keys outside every S_t have a gradient too."""
    q, k, index = make_inputs(8, 30)
    doc_start = make_doc_start((30,))
    found = index_kl_dense(q, k, SCALE, *index, doc_start, topk=2)
    assert_close(found.kl_sum, index_kl_dense(q, k, SCALE, *index, doc_start).kl_sum)  # topk is for statistics only
    never_chosen = torch.ones(30, dtype=torch.bool)
    never_chosen[index_topk(*index, doc_start, 2).unique().clamp(min=0)] = False
    (d_keys,) = torch.autograd.grad(found.kl_sum, index[1])
    assert never_chosen.sum() > 3 and d_keys[never_chosen].abs().amax(dim=1).gt(1e-6).all()


def test_narrow_inputs_are_computed_in_fp32():
    doc_start = make_doc_start((20, 13))
    q, k, index = make_inputs(9, 33, torch.bfloat16)
    wide = [t.detach().float().requires_grad_() for t in index]
    narrow_kl = index_kl_dense(q, k, SCALE, *index, doc_start).kl_sum
    wide_kl = ref.index_kl_dense(q.float(), k.float(), SCALE, *wide, doc_start).kl.sum()
    assert narrow_kl.dtype == torch.float32
    assert_close(narrow_kl, wide_kl)
    for a, b in zip(torch.autograd.grad(narrow_kl, index), torch.autograd.grad(wide_kl, wide), strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b.to(torch.bfloat16)) or (a.float() - b).abs().max() <= 2**-8 * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("block", [None, *BLOCKS])
@pytest.mark.parametrize("name", LAYOUTS)
def test_attention_of_the_same_pass_equals_the_reference(name, block, dtype):
    doc_start = layout(name)
    q, k, index = make_inputs(11, len(doc_start), dtype)
    (v,) = randn(12, (len(doc_start), 3, 4), dtype=dtype)
    out, found = op(q, k, v, SCALE, *index, doc_start, block=block)
    assert_close(out, attention_ref.mla_dense(q, k, v, doc_start, SCALE))
    assert not out.requires_grad
    assert_close(found.kl_sum, ref.index_kl_dense(q, k, SCALE, *index, doc_start).kl.sum())


@pytest.mark.parametrize("block", [None, 7])
@pytest.mark.parametrize("rows", [slice(0, 20), slice(20, 45), slice(45, 63), "zigzag"])
def test_the_queries_of_one_rank_against_all_keys(rows, block):
    """Context parallelism: the ranks' shares of loss, statistics, output and gradients add up to the whole's."""
    doc_start = make_doc_start((17, 1, 40), padding=5)
    q, k, index = make_inputs(13, 63)
    (v,) = randn(14, (63, 3, 4))
    at = torch.tensor([*range(10), *range(50, 63)]) if rows == "zigzag" else torch.arange(63)[rows]
    q_pos = torch.arange(63)[at]
    mine = [t.detach().requires_grad_() for t in (index[0][at], index[1], index[2][at])]
    out, found = op(q[at], k, v, SCALE, *mine, doc_start[at], topk=6, q_pos=q_pos, block=block)
    whole = ref.index_kl_dense(q, k, SCALE, *index, doc_start, topk=6)
    assert_close(out, attention_ref.mla_dense(q, k, v, doc_start, SCALE)[at])
    assert_close(found.kl_sum, whole.kl[at].sum())
    assert whole.mass is not None
    assert_close(found.stats["mass"], whole.mass[at].sum())
    gradients = torch.autograd.grad(found.kl_sum, mine)
    expected = torch.autograd.grad(whole.kl[at].sum(), index)
    for a, b in zip(gradients, [expected[0][at], expected[1], expected[2][at]], strict=True):
        assert_close(a, b)


def test_twenty_repeats_are_equal():
    q, k, index = make_inputs(15, 120, torch.float32)

    def run():
        found = index_kl_dense(q, k, SCALE, *index, make_doc_start((80, 40)), topk=9)
        return [found.kl_sum.detach(), *found.stats.values(), *torch.autograd.grad(found.kl_sum, index)]

    first = run()
    assert all(torch.equal(a, b) for _ in range(19) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("block", [None, 16])
def test_memory_does_not_grow_with_the_square(block):
    rows = 3072 if block is None else 1024
    q, k, index = make_inputs(10, rows, torch.float32, heads=2, index_heads=2)
    with LargestTensor() as largest:
        index_kl_dense(q, k, SCALE, *index, make_doc_start((rows,)), topk=16, block=block).kl_sum.backward()
    assert 0 < largest.elements < rows * rows
    assert index[0].grad is not None
