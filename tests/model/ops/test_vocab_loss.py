"""Chunked log-probabilities of the targets: reference against torch's cross-entropy, streaming against reference."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.vocab_loss import KeptSets, token_logprobs
from model.ops.vocab_loss import reference as ref
from tests.model.ops.cases import LargestTensor, assert_close, assert_same_gradients, randn

ROWS, WIDTH, VOCABULARY = 37, 6, 53
CHUNKS = [None, 1, 7, 36, 1000]


def make_targets(seed: int, rows: int = ROWS, masked: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < masked] = -100
    return targets


def test_reference_is_cross_entropy():
    hidden, weight = randn(0, (ROWS, WIDTH), (VOCABULARY, WIDTH))
    targets = make_targets(1)
    expected = -F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="none")
    assert_close(ref.token_logprobs(hidden, weight, targets), expected)
    inputs = [hidden[:5].detach().requires_grad_(), weight]
    assert torch.autograd.gradcheck(lambda *a: ref.token_logprobs(*a, targets[:5]), inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("words", [None, 1, 10, VOCABULARY - 1])
@pytest.mark.parametrize("masked", [0.0, 0.3, 1.0])
def test_streaming_equals_reference(masked, words, chunk, dtype):
    inputs = randn(2, (ROWS, WIDTH), (VOCABULARY, WIDTH), dtype=dtype)
    targets = make_targets(3, masked=masked)
    tiles = {"chunk": chunk, "vocab_chunk": words}
    found = token_logprobs(*inputs, targets, **tiles)
    assert_close(found, ref.token_logprobs(*inputs, targets))
    assert found[targets == -100].eq(0).all()
    assert_same_gradients(
        lambda *a: token_logprobs(*a, targets, **tiles), lambda *a: ref.token_logprobs(*a, targets), inputs
    )


def test_gradients_by_finite_differences():
    targets = torch.tensor([3, -100, 0, 4])
    assert torch.autograd.gradcheck(
        lambda *a: token_logprobs(*a, targets, chunk=3, vocab_chunk=2), randn(4, (4, 3), (5, 3))
    )


def test_frozen_weight():
    hidden, weight = randn(5, (ROWS, WIDTH), (VOCABULARY, WIDTH))
    targets = make_targets(6)
    token_logprobs(hidden, weight.detach(), targets).sum().backward()
    (expected,) = torch.autograd.grad(ref.token_logprobs(hidden, weight, targets).sum(), hidden)
    assert hidden.grad is not None
    assert_close(hidden.grad, expected)
    assert weight.grad is None


def test_large_logits_stay_finite():
    hidden, weight = (t.detach().mul(100).requires_grad_() for t in randn(7, (ROWS, WIDTH), (VOCABULARY, WIDTH)))
    hidden32, weight32 = (t.detach().float().requires_grad_() for t in (hidden, weight))
    targets = make_targets(8)
    found = token_logprobs(hidden32, weight32, targets)
    assert_close(found, ref.token_logprobs(hidden, weight, targets))
    assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), (hidden32, weight32)))


def test_autocast_narrows_the_products_alone():
    hidden, weight = randn(9, (ROWS, WIDTH), (VOCABULARY, WIDTH), dtype=torch.float32)
    targets = make_targets(10, masked=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = token_logprobs(hidden, weight, targets)
    assert narrow.dtype == torch.float32
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert_close(narrow, expected)
    assert not torch.equal(narrow, token_logprobs(hidden, weight, targets))


def test_no_row_by_vocabulary_tensor():
    rows, vocabulary = 1500, 20000
    hidden, weight = randn(11, (rows, 4), (vocabulary, 4), dtype=torch.float32)
    targets = torch.arange(rows) * 7
    with LargestTensor() as largest:
        token_logprobs(hidden, weight, targets).sum().backward()
    assert 0 < largest.elements <= 4 << 20  # the tile of 16 MiB, a seventh of [T, V]
    assert hidden.grad is not None and weight.grad is not None


def make_kept(seed: int, targets: Tensor) -> list[list[int]]:
    """A few words with the target among them; every third row keeps all, as an empty list."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for t, target in enumerate(targets.tolist()):
        words = torch.randperm(VOCABULARY, generator=generator)[: 1 + t % 9].tolist()
        found.append([] if t % 3 == 0 else sorted({*words, max(target, 0)}))
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("tiles", [{}, {"chunk": 7, "vocab_chunk": 10}, {"chunk": 36, "vocab_chunk": 1}])
@pytest.mark.parametrize("keeps", [False, True])
def test_temperature_and_kept_sets_equal_reference(keeps, tiles, temperature):
    inputs = randn(12, (ROWS, WIDTH), (VOCABULARY, WIDTH))
    targets = make_targets(13)
    kept = make_kept(14, targets) if keeps else None
    sets = None if kept is None else KeptSets.of(kept)

    def mine(*a: Tensor) -> Tensor:
        return token_logprobs(*a, targets, temperature=temperature, kept=sets, **tiles)

    def reference(*a: Tensor) -> Tensor:
        return ref.token_logprobs(*a, targets, temperature, kept)

    assert_close(mine(*inputs), reference(*inputs))
    assert_same_gradients(mine, reference, inputs)
    if keeps:
        whole = token_logprobs(*inputs, targets, temperature=temperature, **tiles)
        some = torch.tensor([bool(words) and int(y) >= 0 for words, y in zip(kept, targets, strict=True)])
        assert (mine(*inputs) > whole)[some].all() and torch.equal(mine(*inputs)[~some], whole[~some])


def test_a_word_that_is_not_kept_gets_no_gradient():
    hidden, weight = randn(15, (3, WIDTH), (VOCABULARY, WIDTH))
    sets = KeptSets.of([[4, 7], [7, 9], [4]])
    token_logprobs(hidden, weight, torch.tensor([7, 9, 4]), kept=sets).sum().backward()
    assert weight.grad is not None and hidden.grad is not None
    assert set(weight.grad.abs().sum(1).nonzero().flatten().tolist()) == {4, 7, 9}
    assert hidden.grad[2].eq(0).all()  # the only word in the running: its probability is 1


def test_kept_sets_by_row():
    sets = KeptSets.of([[1, 2], [], [5], [0, 3, 4]])
    picked = sets.rows(torch.tensor([3, 1, 0]))
    assert picked.ids.tolist() == [0, 3, 4, 1, 2] and picked.offsets.tolist() == [0, 3, 3, 5]
    assert picked.dropped(slice(2, 5)).tolist() == [[True, False, False], [False] * 3, [False, True, True]]
