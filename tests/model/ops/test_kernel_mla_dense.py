"""The Triton kernel of dense attention against fp64: output and log-sum-exp for every kind of window."""

import pytest
import torch

from tests.model.ops.interpreter import DEVICE, poison_allocations

from model.ops.mla_dense.kernel import Config, forward  # isort: skip  (after the helper: it chooses the interpreter)

CONFIGS = [None, Config(16, 16, 4, 1), Config(32, 64, 4, 2)]
ROWS = 39
# fp32: other orders of summation. 16 bits: probabilities are rounded before they meet the values, the output after.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def windows(name: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    row = torch.arange(ROWS)
    if name == "causal":
        first, last, keys = torch.zeros(ROWS), row, ROWS
    elif name == "packed":  # documents of 3, 1 and 30 rows, 5 of padding
        first = torch.tensor([0] * 3 + [3] + [4] * 30 + [39] * 5)
        last, keys = row, ROWS
    elif name == "wide":  # all see everything: no tile is masked, but the last
        first, last, keys = torch.zeros(ROWS), torch.full((ROWS,), 82), 83
    elif name == "shifted":  # one rank's rows among gathered keys, two documents, the later one first
        first, last, keys = torch.where(row < 20, 85, 3), torch.where(row < 20, row + 90, row + 10), 131
    else:
        first, last, keys = torch.ones(ROWS), torch.zeros(ROWS), 37
    return first.to(DEVICE, torch.int32), last.to(DEVICE, torch.int32), keys


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["causal", "packed", "wide", "shifted", "nothing"])
@pytest.mark.parametrize("heads,dim,value,dtype", [(2, 24, 16, "float32"), (1, 48, 32, "bfloat16"),
                                                   (3, 16, 5, "float16"), (2, 7, 0, "float32")])  # fmt: skip
def test_forward(name, config, heads, dim, value, dtype, monkeypatch):
    first, last, keys = windows(name)
    generator = torch.Generator().manual_seed(0)
    shapes = (ROWS, heads, dim), (keys, heads, dim), (keys, heads, value)
    q, k, v = (torch.randn(s, generator=generator).to(DEVICE, getattr(torch, dtype)) for s in shapes)
    poison_allocations(monkeypatch)
    out, lse = forward(q, k, v, 0.3, first, last, config=config)
    position = torch.arange(keys, device=DEVICE)
    allowed = (position >= first[:, None]) & (position <= last[:, None])
    logits = 0.3 * torch.einsum("thd,shd->ths", q.double(), k.double()).masked_fill(~allowed[:, None], -torch.inf)
    expected_lse = logits.logsumexp(-1)
    expected = torch.einsum("ths,shv->thv", logits.softmax(-1).nan_to_num(0.0), v.double())
    empty = ~allowed.any(1)
    assert lse.dtype == torch.float32 and torch.equal(lse.isneginf(), empty[:, None].expand_as(lse))
    assert out.dtype == q.dtype and out.isfinite().all() and out[empty].eq(0).all()
    seen = ~empty
    if seen.any():
        assert (lse.double() - expected_lse)[seen].abs().max() < 2e-5
        error = (out.double() - expected).abs().amax() if value else torch.zeros(())
        assert error <= TOLERANCE[q.dtype] * (expected.abs().max() if value else 1.0)
    again = forward(q, k, v, 0.3, first, last, config=config)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


def test_large_logits_stay_finite():
    q, k, v = (torch.randn(20, 1, 16, generator=torch.Generator().manual_seed(s)).to(DEVICE) for s in range(3))
    row = torch.arange(20, dtype=torch.int32, device=DEVICE)
    out, lse = forward(300 * q, 300 * k, v, 1.0, torch.zeros_like(row), row)
    assert out.isfinite().all() and lse.isfinite().all()


def test_no_rows():
    empty = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    q, k = torch.zeros(0, 2, 16, device=DEVICE), torch.zeros(5, 2, 16, device=DEVICE)
    assert forward(q, k, k, 1.0, empty, empty)[0].shape == (0, 2, 16)
