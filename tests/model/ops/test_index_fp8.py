"""FP8 scoring: Hadamard and quantisation against independent definitions, and the op's selected sets against an
emulation of DeepSeek-V3.2's inference path in numpy, written from its description alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from model.fp8 import E4M3_MAX
from model.ops.index_topk import index_topk
from model.ops.index_topk.fp8 import hadamard, quantise, rounded
from model.ops.settings import OpSettings
from tests.model.ops.cases import make_doc_start, randn

FP8 = OpSettings(fp8_index=True)


def sylvester(width: int) -> np.ndarray:
    """H_2n = [[H_n, H_n], [H_n, -H_n]] / sqrt(width)."""
    h = np.ones((1, 1))
    while len(h) < width:
        h = np.block([[h, h], [h, -h]])
    return h / math.sqrt(width)


def e4m3_grid() -> np.ndarray:
    """Every non-negative number of 4 exponent and 3 mantissa bits, bias 7, ascending; 480 is not a number."""
    values = [m / 8 * 2.0**-6 for m in range(8)]
    values += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return np.array(values[:-1])


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """To the nearest, ties to the even mantissa: the grid's even positions."""
    grid = e4m3_grid()
    above = np.searchsorted(grid, np.abs(x)).clip(1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    down, up = np.abs(x) - low, high - np.abs(x)
    take_high = (up < down) | ((up == down) & (above % 2 == 0))
    return np.sign(x) * np.where(take_high, high, low)


def emulate(q: np.ndarray, k: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Scores [T, T]: rotate, one scale ceil-to-a-power-of-two(amax / 448) a row, product of the rounded values, relu,
    head weights that carry q's scale, k's scale at the end."""

    def quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = x @ sylvester(x.shape[-1])
        scale = 2.0 ** np.ceil(np.log2(np.maximum(np.abs(x).max(-1), 1e-4) / 448.0))
        return to_e4m3(x / scale[..., None]), scale

    (q8, q_scale), (k8, k_scale) = quantised(q), quantised(k)
    products = np.maximum(np.einsum("thd,sd->ths", q8, k8), 0.0)
    return np.einsum("ths,th->ts", products, w * q_scale) * k_scale


def test_the_grid_is_torchs():
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    assert np.array_equal(every, e4m3_grid()) and every[-1] == E4M3_MAX


@pytest.mark.parametrize("width", [1, 2, 16, 128])
def test_hadamard(width):
    (x,) = randn(0, (5, 3, width))
    found = hadamard(x.detach())
    assert np.allclose(found.numpy(), x.detach().numpy() @ sylvester(width), atol=1e-12)
    assert torch.allclose(hadamard(found), x.detach(), atol=1e-12)  # its own inverse
    with pytest.raises(ValueError, match="power of two, got 24"):
        hadamard(torch.zeros(2, 24))


@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_quantise_rounds_to_the_nearest_and_uses_the_range(size):
    x = (randn(1, (400, 32))[0].detach() * size).float()
    values, scale = quantise(x)
    assert values.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert np.array_equal(np.log2(scale.numpy()), np.round(np.log2(scale.numpy())))
    assert np.array_equal(values.double().numpy(), to_e4m3((x / scale[:, None]).double().numpy()))
    amax = x.abs().amax(-1)
    assert (amax <= scale * E4M3_MAX).all()  # nothing saturates
    assert ((amax > scale * E4M3_MAX / 2) | (amax < 1e-4)).all()  # and half the scale would


def test_an_amax_on_the_border_keeps_the_smaller_scale():
    x = torch.zeros(3, 16)
    x[:, 3] = torch.tensor([448.0, 448.0 * 2**-9, 449.0])
    assert quantise(x)[1].tolist() == [1.0, 2.0**-9, 2.0]
    assert quantise(torch.zeros(1, 16))[1].isfinite().all()
    with pytest.raises(ValueError, match="128 channels, got a width of 256"):
        quantise(torch.zeros(2, 256))


@pytest.mark.parametrize("q_pos", [None, "late"])
@pytest.mark.parametrize("block", [None, 7])
@pytest.mark.parametrize("width", [32, 128])
def test_the_selection_is_the_emulations(width, block, q_pos):
    """Rounded values have few bits, so the scores are exact in fp64 on both sides, and ties are real ties."""
    doc_start, topk = make_doc_start((61, 1, 90), 3), 12
    rows = len(doc_start)
    q, k, w = (t.detach() for t in randn(2, (rows, 8, width), (rows, width), (rows, 8)))
    k[:, 5] *= 30.0  # an outlier channel: what the rotation is for
    scores = emulate(*(t.numpy() for t in (q, k, w)))
    at = torch.arange(rows) if q_pos is None else torch.arange(70, rows)
    found = index_topk(q[at], k, w[at], doc_start[at], topk, None if q_pos is None else at, FP8, block)
    plain = index_topk(q[at], k, w[at], doc_start[at], topk, None if q_pos is None else at, block=block)
    for row, t in enumerate(at.tolist()):
        seen = range(int(doc_start[t]), t + 1)
        best = sorted(sorted(seen, key=lambda s, t=t: (-scores[t, s], s))[:topk])
        assert found[row].tolist() == best + [-1] * (topk - len(best)), t
    shared = np.mean([len(set(a) & set(b)) / topk for a, b in zip(found.tolist(), plain.tolist(), strict=True)])
    assert 0.8 < shared < 1.0  # it is another selection, and nearly the same one


def test_rounding_error_of_a_score():
    """e4m3 keeps 4 bits: at most 2^-4 of a factor, on average far less over 128 channels."""
    q, k = (t.detach() for t in randn(3, (200, 128), (200, 128)))
    exact, narrow = q @ k.T, rounded(q) @ rounded(k).T
    error = (narrow - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0.005 < error < 0.05


def test_gradients_do_not_pass_through_fp8():
    """The selection has no gradient; the loss is computed in the op's own precision, whatever the selection used."""
    q, k, w = randn(4, (20, 2, 16), (20, 16), (20, 2))
    found: Tensor = index_topk(q, k, w, make_doc_start((20,)), 4, settings=FP8)
    assert not found.requires_grad and found.dtype == torch.int32
