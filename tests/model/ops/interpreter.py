"""Where the tests of the Triton kernels run: under Triton's interpreter, which tests/conftest.py turns on before triton
is imported; with WINNOW_TEST_GPU=1 in the environment, compiled on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="the kernels need triton")


def _repair_narrow_types() -> None:
    """The interpreter keeps bf16 as uint16; it multiplies those as they are, and truncates where a GPU rounds. On the
    way to e4m3 it rounds halves up and loses NaN; a GPU's `cvt.rn.satfinite` is torch's cast up to 464."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast, convert = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_impl(self, x, dtype):
        if (x.dtype.scalar, dtype.scalar) == (tl.bfloat16, tl.float32):
            return widened(x)  # theirs gives subnormal numbers another value
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, dtype)
        bits = x.data.view(np.uint32)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
        return TensorHandle(bits.astype(np.uint16), tl.bfloat16)

    def create_fp_to_fp(self, x, dtype, rounding_mode):
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.float8e4nv):
            return convert(self, x, dtype, rounding_mode)
        narrow = torch.from_numpy(np.array(x.data)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        return TensorHandle(narrow.view(torch.uint8).numpy(), tl.float8e4nv)

    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    InterpreterBuilder.cast_impl = cast_impl


if DEVICE == "cpu":
    _repair_narrow_types()

GARBAGE = -123456789  # what an integer that was never written holds: neither a position nor -1


def poison_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what torch.empty and torch.empty_like return with NaN (integers: GARBAGE), so an unwritten entry shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def filled(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else GARBAGE)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: filled(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: filled(empty_like(*args, **kwargs)))
