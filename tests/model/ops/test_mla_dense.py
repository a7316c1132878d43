"""Dense attention over packed documents: reference against torch's own attention, streaming against reference."""

import pytest
import torch
import torch.nn.functional as F

from model.ops.index_topk.reference import visible
from model.ops.mla_dense import mla_dense
from model.ops.mla_dense import reference as ref
from tests.model.ops.cases import (
    LAYOUTS,
    LargestTensor,
    assert_close,
    assert_same_gradients,
    layout,
    make_doc_start,
    randn,
)

WIDTHS = [(12, 8), (8, 8), (8, 12)]  # query-key width below, at and above the value width: one of them is padded


def test_reference_is_masked_softmax_attention():
    doc_start = make_doc_start((5, 1, 12))
    q, k, v = randn(0, (18, 3, 6), (18, 3, 6), (18, 3, 4))
    expected = F.scaled_dot_product_attention(
        *(t.transpose(0, 1) for t in (q, k, v)), attn_mask=visible(doc_start), scale=0.3
    )
    assert_close(ref.mla_dense(q, k, v, doc_start, 0.3), expected.transpose(0, 1))


def test_reference_gradients_by_finite_differences():
    doc_start = make_doc_start((4, 1), padding=2)
    inputs = randn(1, (7, 2, 3), (7, 2, 3), (7, 2, 2))
    assert torch.autograd.gradcheck(lambda *a: ref.mla_dense(*a, doc_start, 0.7), inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_streaming_equals_reference(name, widths, dtype):
    doc_start = layout(name)
    rows, (width, value_width) = len(doc_start), widths
    inputs = randn(2, (rows, 3, width), (rows, 3, width), (rows, 3, value_width), dtype=dtype)
    out = mla_dense(*inputs, doc_start, 0.4)
    assert_close(out, ref.mla_dense(*inputs, doc_start, 0.4))
    assert out[doc_start > torch.arange(rows)].eq(0).all()
    if name != "all_padding":
        assert_same_gradients(
            lambda *a: mla_dense(*a, doc_start, 0.4), lambda *a: ref.mla_dense(*a, doc_start, 0.4), inputs
        )


def test_packed_equals_apart_and_padding_gets_no_gradient():
    lengths = (19, 1, 30)
    doc_start = make_doc_start(lengths, padding=4)
    inputs = randn(3, (54, 2, 6), (54, 2, 6), (54, 2, 4))
    packed, start = mla_dense(*inputs, doc_start, 0.5), 0
    for length in lengths:
        part = [t[start : start + length] for t in inputs]
        assert_close(packed[start : start + length], mla_dense(*part, make_doc_start((length,)), 0.5))
        start += length
    for gradient in torch.autograd.grad(packed.square().sum(), inputs):
        assert gradient[start:].eq(0).all() and gradient[:start].ne(0).any()


def test_memory_does_not_grow_with_the_square():
    rows = 1024
    inputs = randn(4, (rows, 2, 12), (rows, 2, 12), (rows, 2, 8), dtype=torch.float32)
    with LargestTensor() as largest:
        mla_dense(*inputs, make_doc_start((rows - 3,), padding=3), 0.3).sum().backward()
    assert 0 < largest.elements < rows * rows
    assert all(t.grad is not None for t in inputs)
