"""The fused top-k kernel against a stable sort of exact scores: ties, windows, overflow of the candidate buffer."""

import pytest
import torch
from torch import Tensor

from tests.model.ops.cases import integers
from tests.model.ops.interpreter import DEVICE, GARBAGE, poison_allocations

from model.ops.index_topk.kernel import Config, topk  # isort: skip  (after the helper: it chooses the interpreter)

CONFIGS = [None, Config(1, 16, 16, 4, 2), Config(4, 32, 64, 4, 1)]
WINDOWS = ("causal", "packed", "shifted", "nothing", "short")
ROWS = 13


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    poison_allocations(monkeypatch)


def windows(name: str) -> tuple[Tensor, Tensor, int]:
    """first, last int32 [ROWS] and the number of keys."""
    row = torch.arange(ROWS)
    if name == "causal":
        first, last, keys = torch.zeros(ROWS), row, ROWS
    elif name == "packed":  # documents of 1, 6, 1 and 3 rows, 2 rows of padding
        first, last, keys = torch.tensor([0, 1, 1, 1, 1, 1, 1, 7, 8, 8, 8, 13, 13]), row, ROWS
    elif name == "shifted":  # one rank's rows among gathered keys, two documents, the later one first
        first, last, keys = torch.where(row < 5, 85, 3), (row + 55) % 60 + 30, 103
    elif name == "nothing":
        first, last, keys = torch.ones(ROWS), torch.zeros(ROWS), 37
    else:
        first, last, keys = torch.zeros(ROWS), torch.full((ROWS,), 4), 5
    return first.to(DEVICE, torch.int32), last.to(DEVICE, torch.int32), keys


def expected(scores: Tensor, first: Tensor, last: Tensor, topk: int) -> Tensor:
    position = torch.arange(scores.shape[1])
    allowed = (position >= first.cpu()[:, None]) & (position <= last.cpu()[:, None])
    order = scores.masked_fill(~allowed, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    chosen = torch.zeros_like(allowed).scatter_(1, order, True) & allowed
    rows = [row.nonzero()[:, 0].tolist() for row in chosen]
    return torch.tensor([row + [-1] * (topk - len(row)) for row in rows], dtype=torch.int32)


def exact_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    products = torch.einsum("thd,sd->ths", q.double(), k.double()).relu()
    return torch.einsum("th,ths->ts", w.double(), products).cpu()


def assert_topk(inputs: list[Tensor], window: tuple[Tensor, Tensor], number: int, scores: Tensor, **options) -> Tensor:
    window = (window[0].to(DEVICE), window[1].to(DEVICE))
    found = topk(*(t.to(DEVICE) for t in inputs), *window, number, **options)
    assert found.dtype == torch.int32 and found.shape == (inputs[0].shape[0], number)
    assert not (found == GARBAGE).any()
    assert torch.equal(found.cpu(), expected(scores, *window, number))
    return found


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", WINDOWS)
def test_ties_and_windows(name, config):
    """Whole numbers: every score is exact, so the set must be the stable sort's, entry for entry."""
    first, last, keys = windows(name)
    inputs = integers(1, (ROWS, 3, 8), (keys, 8), (ROWS, 3), high=1)
    scores = exact_scores(*inputs)
    ranked = scores.sort(dim=-1, descending=True).values
    assert keys < 9 or (ranked[:, 6] == ranked[:, 7]).sum() > 3  # ties on the border, or nothing is proved
    for number in (1, 7):
        assert_topk(inputs, (first, last), number, scores, config=config)


@pytest.mark.parametrize("order", ["ascending", "descending", "equal", "negative"])
def test_overflow(order):
    """Rising scores let every key in, so the buffer overflows as often as it can; falling ones let none in; a plateau
    keeps the first positions, be it of negative scores."""
    keys, last = 200, torch.tensor([199, 150, 3], dtype=torch.int32)
    level = {"ascending": torch.arange(keys), "descending": keys - torch.arange(keys)}.get(order, torch.ones(keys))
    q, k, w = torch.ones(3, 2, 16), torch.zeros(keys, 16), torch.ones(3, 2)
    k[:, 0] = level
    if order == "negative":
        w = -w
    scores = exact_scores(q, k, w)
    for number in (3, 32):
        assert_topk([q, k, w], (torch.zeros_like(last), last), number, scores, config=Config(4, 16, 16, 4, 2))


def test_signed_zeros_tie():
    """Scores that alternate between -0.0 and 0.0: a comparison of bits would prefer the latter."""
    rows, keys = 3, 40
    k_scale = torch.where(torch.arange(keys) % 2 == 0, -1.0, 1.0)  # 0 * -1 = -0
    window = (torch.zeros(rows, dtype=torch.int32), torch.full((rows,), keys - 1, dtype=torch.int32))
    inputs = [torch.ones(rows, 1, 16), torch.zeros(keys, 16), torch.ones(rows, 1)]
    found = assert_topk(inputs, window, 6, torch.zeros(rows, keys), k_scale=k_scale.to(DEVICE))
    assert found.tolist() == [[0, 1, 2, 3, 4, 5]] * rows


@pytest.mark.parametrize("heads,dim,dtype", [(1, 16, "float32"), (8, 24, "float16"), (16, 64, "bfloat16"),
                                             (3, 128, "float8_e4m3fn"), (4, 32, "float32")])  # fmt: skip
def test_head_counts_and_dtypes(heads, dim, dtype):
    """Whole numbers again, exact in every dtype; with a scale per key that is a power of two."""
    first, last, keys = windows("shifted")
    q, k, w = integers(2, (ROWS, heads, dim), (keys, dim), (ROWS, heads), high=2)
    k_scale = 2.0 ** torch.randint(-2, 3, (keys,), generator=torch.Generator().manual_seed(0))
    scores = exact_scores(q, k, w) * k_scale
    inputs = [q.to(getattr(torch, dtype)), k.to(getattr(torch, dtype)), w]
    assert_topk(inputs, (first, last), 5, scores, k_scale=k_scale.to(DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_scores(dtype):
    """Sums of products of random numbers, taken in fp32: apart from the order of summation they are exact, and no two
    scores of a row are so close that it could matter."""
    rows, keys, number = 5, 300, 64
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(s, generator=generator).to(dtype) for s in ((rows, 8, 64), (keys, 64), (rows, 8))]
    scores = exact_scores(*inputs)
    ranked = scores.sort(dim=-1, descending=True).values
    gap = (ranked[:, number - 1] - ranked[:, number]).min() / ranked.abs().max()
    assert gap > 1e-6
    last = torch.full((rows,), keys - 1, dtype=torch.int32)
    found = [assert_topk(inputs, (torch.zeros_like(last), last), number, scores, config=c) for c in CONFIGS * 2]
    assert all(torch.equal(found[0], other) for other in found)


def test_no_rows():
    empty = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    q, k, w = (torch.zeros(s, device=DEVICE) for s in ((0, 2, 16), (9, 16), (0, 2)))
    assert topk(q, k, w, empty, empty, 4).shape == (0, 4)
