"""Nothing of [T, T] or [T, V] exists at T = 4K and 16K: the largest tensor that any operation inside an op returns."""

from __future__ import annotations

import pytest
import torch

from model.ops.index_kl_dense import index_kl_dense
from model.ops.index_kl_selected import index_kl_selected
from model.ops.index_topk import index_topk
from model.ops.mla_dense import mla_dense, mla_dense_lse
from model.ops.sparse_mla import sparse_mla
from model.ops.vocab_loss import token_logprobs
from tests.model.ops.cases import LargestTensor, make_doc_start, randn

TOPK, HEADS, DIM, LATENT = 32, 2, 8, 16


def index(rows: int) -> list[torch.Tensor]:
    return randn(0, (rows, HEADS, DIM), (rows, DIM), (rows, HEADS), dtype=torch.float32)


def attention(rows: int) -> list[torch.Tensor]:
    return randn(1, (rows, HEADS, DIM), (rows, HEADS, DIM), (rows, HEADS, DIM), dtype=torch.float32)


def sparse_layer(rows: int) -> None:
    doc_start, learned = make_doc_start((rows - 5,), 5), index(rows)
    shapes = (rows, HEADS, DIM), (rows, HEADS, DIM), (HEADS, DIM, LATENT), (rows, LATENT), (rows, DIM)
    tensors = randn(2, *shapes, dtype=torch.float32)
    idx = index_topk(*learned, doc_start, TOPK)
    attended = sparse_mla(*tensors, idx, 0.3, target=True)
    assert attended.target is not None
    kl = index_kl_selected(attended.target, idx, *learned, stats=True)
    (attended.out.sum() + kl.kl_sum).backward()
    assert all(t.grad is not None for t in [*tensors, *learned])


def warm_up(rows: int) -> None:
    learned = index(rows)
    with torch.no_grad():
        q, k, v = attention(rows)
    index_kl_dense(q, k, v, 0.3, *learned, make_doc_start((rows - 5,), 5), TOPK)[1].kl_sum.backward()
    assert all(t.grad is not None for t in learned)


def dense(rows: int) -> None:
    mla_dense(*attention(rows), make_doc_start((rows - 5,), 5), 0.3).sum().backward()


def dense_lse(rows: int) -> None:
    mla_dense_lse(*attention(rows), make_doc_start((rows - 5,), 5), 0.3)


def vocabulary(rows: int) -> None:
    hidden, weight = randn(3, (rows, 4), (rows, 4), dtype=torch.float32)  # as many words as rows
    token_logprobs(hidden, weight, torch.arange(rows)).sum().backward()


@pytest.mark.parametrize("rows", [4096, 16384])
@pytest.mark.parametrize("run", [sparse_layer, warm_up, dense, dense_lse, vocabulary])
def test_nothing_is_square(run, rows):
    with LargestTensor() as largest:
        run(rows)
    # a tile of logits, of rows and vocabulary, is a quarter of [T, V] at 4K; a block of query rows is far less
    assert 0 < largest.elements <= max(rows * rows // 60, 4 << 20), largest.elements / rows**2
