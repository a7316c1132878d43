"""The warm-up kernels against fp64: scores, the attention target, and the indexer's gradient, chunk by chunk."""

import pytest
import torch
from torch import Tensor

from tests.model.ops.interpreter import DEVICE, poison_allocations

from model.ops.index_kl_dense.kernel import Config, backward, scores, target  # isort: skip  (after the helper)

# name: first, last of seven rows, then keys [start, stop) and S. Odd everywhere; rows that see nothing.
CHUNKS: dict[str, tuple[list[int], list[int], int, int, int]] = {
    "causal": ([0] * 7, [0, 1, 2, 3, 4, 5, 6], 0, 7, 7),
    "packed": ([0, 1, 1, 4, 4, 99, 99], [30, 31, 32, 33, 34, 35, 36], 0, 37, 41),
    "part": ([0, 0, 60, 60, 3, 9, 0], [90, 17, 61, 75, 2, 95, 80], 18, 83, 97),
    "nothing": ([1] * 7, [0] * 7, 0, 33, 33),
}
CONFIGS = [None, Config(16, 16, 4, 1), Config(32, 64, 4, 3)]
# fp32: sums of about a hundred products taken in another order. bf16: inputs are exact and products are summed in fp32,
# so scores and target are held to the same; a gradient rounds one factor of each product to 8 bits (2^-9 relative).
FP32, ROUNDED = 2e-5, 2**-8
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy, where the interpreter masks afterwards


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    poison_allocations(monkeypatch)


def chunk(name: str) -> tuple[Tensor, Tensor, int, int, int]:
    first, last, *keys = CHUNKS[name]
    rows = torch.tensor([first, last], dtype=torch.int32, device=DEVICE)
    return rows[0], rows[1], *keys


def visible(name: str) -> Tensor:
    first, last, start, stop, _ = chunk(name)
    keys = torch.arange(start, stop, device=DEVICE)
    return (keys >= first[:, None]) & (keys <= last[:, None])


def randn(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert actual.dtype == torch.float32 and actual.shape == expected.shape, what
    finite = expected.isfinite()
    assert torch.equal(actual[~finite].double(), expected[~finite]), what
    error = (actual.double() - expected)[finite].abs().max() if finite.any() else torch.zeros(())
    limit = tolerance * max(1e-3, expected[finite].abs().max().item() if finite.any() else 0.0)
    assert error <= limit, f"{what}: {error:.2e} above {limit:.2e}"


def exact_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("th,ths->ts", w.double(), torch.einsum("thd,sd->ths", q.double(), k.double()).relu())


def for_indexer(config: Config | None) -> Config | None:
    return config and config._replace(rows=config.rows // 16 * 2)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", CHUNKS)
@pytest.mark.parametrize("heads,dim,dtype", [(3, 24, "float32"), (8, 16, "bfloat16"), (1, 64, "float32")])
def test_scores(name, config, heads, dim, dtype):
    first, last, start, stop, keys = chunk(name)
    q, k, w = randn(0, (7, heads, dim), (keys, dim), (7, heads), dtype=getattr(torch, dtype))
    config = for_indexer(config) if heads > 1 else config and config._replace(rows=16)
    found = scores(q, k, w, first, last, start, stop, config=config)
    assert_near(found, exact_scores(q, k, w)[:, start:stop].masked_fill(~visible(name), -torch.inf), FP32, "scores")
    assert torch.equal(found, scores(q, k, w, first, last, start, stop, config=config))


def logits_and_lse(name: str, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The logits [H, R, S] and their log-sum-exp over all that a row sees, of which the chunk may hold a part."""
    first, last, _, _, keys = chunk(name)
    position = torch.arange(keys, device=DEVICE)
    allowed = (position >= first[:, None]) & (position <= last[:, None])
    logits = scale * torch.einsum("thd,shd->hts", q.double(), k.double())
    return logits, logits.masked_fill(~allowed, -torch.inf).logsumexp(-1).t()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", CHUNKS)
@pytest.mark.parametrize("heads,dim,dtype", [(3, 24, "float32"), (8, 48, "bfloat16"), (1, 16, "float16"),
                                             (2, 7, "float32")])  # fmt: skip
def test_target(name, config, heads, dim, dtype):
    """Invisible logits are made so large that exp overflows: a kernel that masks by multiplication shows NaN."""
    first, last, start, stop, keys = chunk(name)
    q, k = randn(1, (7, heads, dim), (keys, heads, dim), dtype=getattr(torch, dtype))
    seen = torch.zeros(keys, dtype=torch.bool, device=DEVICE)
    for a, b in zip(first.tolist(), last.tolist(), strict=True):
        seen[a : b + 1] = True
    k[~seen] *= 1000.0
    logits, lse = logits_and_lse(name, q, k, 0.3)
    expected = (logits - lse.t()[..., None]).exp().mean(0)[:, start:stop].masked_fill(~visible(name), 0.0)
    arguments = (q, k, lse.float().contiguous(), 0.3, first, last, start, stop)
    found = target(*arguments, config=config)
    assert_near(found, expected, FP32, "target")
    assert torch.equal(found, target(*arguments, config=config))


def test_a_row_without_lse_is_zero():
    """-inf says that the row saw nothing, whatever its window is."""
    first, last, start, stop, keys = chunk("causal")
    q, k = randn(2, (7, 2, 16), (keys, 2, 16), dtype=torch.float32)
    _, lse = logits_and_lse("causal", q, k, 0.3)
    lse[3] = -torch.inf
    p = target(q, k, lse.float().contiguous(), 0.3, first, last, start, stop)
    assert (p[3] == 0).all() and torch.allclose(p.sum(1)[[2, 4]].cpu(), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", CHUNKS)
@pytest.mark.parametrize("heads,dim,dtype", [(3, 24, "float32"), (8, 16, "bfloat16"), (1, 64, "float16")])
def test_backward(name, config, heads, dim, dtype):
    _, _, start, stop, keys = chunk(name)
    q, k, w = randn(3, (7, heads, dim), (keys, dim), (7, heads), dtype=getattr(torch, dtype))
    (d_scores,) = randn(4, (7, stop - start), dtype=torch.float32)
    d_scores = d_scores.masked_fill(~visible(name), 0.0)
    (before,) = randn(5, (keys, dim), dtype=torch.float32)
    exact = [t.double().requires_grad_() for t in (q, k, w)]
    expected = torch.autograd.grad((exact_scores(*exact)[:, start:stop] * d_scores).sum(), exact)
    config = for_indexer(config) if heads > 1 else config and config._replace(rows=16)
    d_k = before.clone()
    d_q, d_w = backward(q, k, w, d_scores, start, d_k, config=config and (config, config))
    tolerance = FP32 if dtype == "float32" else ROUNDED
    assert_near(d_q, expected[0], tolerance, "d_q")
    assert_near(d_k, expected[1] + before, tolerance, "d_k")
    assert_near(d_w, expected[2], tolerance, "d_w")
    again = before.clone()
    repeated = backward(q, k, w, d_scores, start, again, config=config and (config, config))
    assert torch.equal(again, d_k) and torch.equal(repeated[0], d_q) and torch.equal(repeated[1], d_w)


def test_relu_has_no_slope_at_zero():
    q, k, w = torch.zeros(2, 2, 16), torch.ones(3, 16), torch.ones(2, 2)
    d_k = torch.zeros(3, 16, device=DEVICE)
    d_q, d_w = backward(*(t.to(DEVICE) for t in (q, k, w, torch.ones(2, 3))), 0, d_k)
    assert (d_q == 0).all() and (d_k == 0).all() and (d_w == 0).all()


def test_empty_chunks():
    first, last, *_ = chunk("causal")
    q, k, w = randn(6, (7, 2, 16), (9, 16), (7, 2), dtype=torch.float32)
    assert scores(q, k, w, first, last, 4, 4).shape == (7, 0)
    assert scores(q[:0], k, w[:0], first[:0], last[:0], 0, 9).shape == (0, 9)
    assert target(q, k[:, None].repeat(1, 2, 1), w, 1.0, first, last, 4, 4).shape == (7, 0)
    d_k = torch.zeros_like(k)
    d_q, d_w = backward(q, k, w, torch.zeros(7, 0, device=DEVICE), 4, d_k)
    assert (d_q == 0).all() and (d_w == 0).all() and (d_k == 0).all()
