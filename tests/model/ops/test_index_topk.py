"""Top-k of the indexer: the streaming form against the brute-force reference, ties first of all."""

import pytest
import torch
from torch import Tensor

from model.ops.index_topk import index_topk
from model.ops.index_topk import reference as ref
from tests.model.ops.cases import BLOCKS, LAYOUTS, LargestTensor, assert_close, integers, layout, make_doc_start, randn


def by_hand(q: Tensor, k: Tensor, w: Tensor, doc_start: Tensor, topk: int) -> list[list[int]]:
    """The definition in plain Python: best score first, then lowest position."""
    rows = []
    for t in range(q.shape[0]):
        scores = {
            s: sum(w[t, h].item() * max(torch.dot(q[t, h], k[s]).item(), 0.0) for h in range(q.shape[1]))
            for s in range(int(doc_start[t]), t + 1)
        }
        best = sorted(sorted(scores, key=lambda s: (-scores[s], s))[:topk])
        rows.append(best + [-1] * (topk - len(best)))
    return rows


def ties_on_border(scores: Tensor, allowed: Tensor, topk: int) -> int:
    """Rows in which the last score taken equals the first one left."""
    ranked = scores.masked_fill(~allowed, -torch.inf).sort(dim=-1, descending=True).values
    return int(((ranked[:, topk - 1] == ranked[:, topk]) & ranked[:, topk].isfinite()).sum())


@pytest.mark.parametrize("name", LAYOUTS)
def test_reference_is_the_definition(name):
    doc_start = layout(name)
    rows = len(doc_start)
    q, k, w = integers(0, (rows, 2, 4), (rows, 4), (rows, 2), dtype=torch.float64)
    for topk in (1, 6, rows, rows + 3):
        assert ref.index_topk(q, k, w, doc_start, topk).tolist() == by_hand(q, k, w, doc_start, topk)


@pytest.mark.parametrize("block", [None, *BLOCKS])
@pytest.mark.parametrize("name", LAYOUTS)
def test_streaming_equals_reference(name, block):
    doc_start = layout(name)
    rows = len(doc_start)
    q, k, w = randn(1, (rows, 4, 8), (rows, 8), (rows, 4))
    for topk in (1, 5, rows - 1, rows, rows + 9):
        found = index_topk(q, k, w, doc_start, topk, block=block)
        assert found.dtype == torch.int32
        assert torch.equal(found, ref.index_topk(q, k, w, doc_start, topk)), topk


@pytest.mark.parametrize("block", [None, *BLOCKS])
@pytest.mark.parametrize("heads", [1, 4])
def test_ties_go_to_the_lowest_index(heads, block):
    doc_start = layout("padded")
    rows, topk = len(doc_start), 6
    q, k, w = integers(2, (rows, heads, 5), (rows, 5), (rows, heads))
    allowed = ref.visible(doc_start)
    assert ties_on_border(ref.index_scores(q, k, w), allowed, topk) > 10  # or the test would prove nothing
    found = index_topk(q, k, w, doc_start, topk, block=block)
    assert torch.equal(found, ref.index_topk(q, k, w, doc_start, topk))


@pytest.mark.parametrize("block", [None, 5])
@pytest.mark.parametrize("sign", [-1.0, 0.0, 1.0])
def test_all_equal_scores_take_the_first_positions(sign, block):
    """Positive, negative and zero plateaus; relu makes the zero one common."""
    doc_start = layout("padded")
    rows, topk = len(doc_start), 4
    q, k, w = torch.ones(rows, 2, 3), torch.ones(rows, 3), torch.full((rows, 2), sign)
    if sign == 0.0:
        q, w = -q, torch.tensor([1.0, -1.0]).expand(rows, 2)
    found = index_topk(q, k, w, doc_start, topk, block=block)
    for t, start in enumerate(doc_start.tolist()):
        expected = list(range(start, t + 1))[:topk]
        assert found[t].tolist() == expected + [-1] * (topk - len(expected))


def test_narrow_inputs_are_scored_in_fp32():
    """Products rounded to bf16 would choose otherwise."""
    doc_start = make_doc_start((257,))
    q, k, w = (t.detach() for t in randn(3, (257, 4, 16), (257, 16), (257, 4), dtype=torch.bfloat16))
    found = index_topk(q, k, w, doc_start, 32)
    assert torch.equal(found, ref.index_topk(q.double(), k.double(), w.double(), doc_start, 32))
    assert not torch.equal(found, ref.index_topk(q, k, w, doc_start, 32))  # the reference stays in bf16


def test_packed_equals_apart():
    lengths = (31, 1, 50)
    doc_start = make_doc_start(lengths, padding=3)
    rows = len(doc_start)
    q, k, w = integers(4, (rows, 3, 4), (rows, 4), (rows, 3), high=3)
    packed, start = index_topk(q, k, w, doc_start, 8, block=16), 0
    for length in lengths:
        part = slice(start, start + length)
        alone = index_topk(q[part], k[part], w[part], make_doc_start((length,)), 8)
        assert torch.equal(packed[part], torch.where(alone < 0, alone, alone + start))
        start += length
    assert (packed[start:] == -1).all()


def test_twenty_repeats_are_equal():
    doc_start = make_doc_start((200, 57))
    q, k, w = (t.detach() for t in randn(5, (257, 2, 8), (257, 8), (257, 2), dtype=torch.float32))
    first = index_topk(q, k, w, doc_start, 16)
    assert all(torch.equal(first, index_topk(q, k, w, doc_start, 16)) for _ in range(19))


@pytest.mark.parametrize("block", [None, 16])
def test_memory_does_not_grow_with_the_square(block):
    rows = 4096 if block is None else 1024
    q, k, w = (t.detach() for t in randn(6, (rows, 2, 4), (rows, 4), (rows, 2), dtype=torch.float32))
    with LargestTensor() as largest:
        index_topk(q, k, w, make_doc_start((rows,)), 16, block=block)
    assert 0 < largest.elements < rows * rows


@pytest.mark.parametrize("block", [None, 7])
@pytest.mark.parametrize("rows", [slice(0, 20), slice(20, 63), "zigzag"])
def test_the_queries_of_one_rank_against_all_keys(rows, block):
    doc_start = make_doc_start((17, 1, 40), padding=5)
    q, k, w = integers(8, (63, 3, 4), (63, 4), (63, 3), high=3)
    at = torch.tensor([*range(10), *range(50, 63)]) if rows == "zigzag" else torch.arange(63)[rows]
    found = index_topk(q[at], k, w[at], doc_start[at], 8, q_pos=at, block=block)
    assert torch.equal(found, ref.index_topk(q, k, w, doc_start, 8)[at])


@pytest.mark.parametrize("rows", [700, 3001])
@pytest.mark.parametrize("kind", ["normal", "clustered", "plateau", "rising"])
def test_every_way_through_the_selection(kind, rows):
    """Rows far longer than k, where a folded row bounds the border: candidates in few groups, ties by the hundred."""
    topk = 9
    (q,), k = integers(9, (rows, 1, 1), high=1), torch.ones(rows, 1)
    k = {
        "normal": randn(10, (rows, 1))[0].detach().float().abs(),
        "clustered": (torch.arange(rows)[:, None] % 64 == 5) * (1.0 + torch.arange(rows)[:, None] / rows),
        "plateau": integers(11, (rows, 1), high=2)[0],
        "rising": torch.arange(rows)[:, None].float(),
    }[kind]
    q, w, doc_start = q.abs() + 1, torch.ones(rows, 1), make_doc_start((rows // 2, 3, rows - rows // 2 - 3))
    assert torch.equal(index_topk(q, k, w, doc_start, topk), ref.index_topk(q, k, w, doc_start, topk))


def test_scores_in_fp64():
    q, k, w = randn(7, (9, 3, 4), (11, 4), (9, 3))
    scores = ref.index_scores(q, k, w)
    for t in range(9):
        for s in range(11):
            expected = sum(w[t, h] * torch.clamp(q[t, h] @ k[s], min=0) for h in range(3))
            assert_close(scores[t, s], expected)
