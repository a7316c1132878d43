"""What `precision` means: fp32, bf16 (parameters stay fp32, matrix products run in bf16), or fp8 (as bf16, and the
linears that DeepSeek stores in FP8 run their products in block-scaled e4m3; `model/layers.py` lists them)."""

from __future__ import annotations

import torch

from model.ops.fp8_linear import has_block_scaled_mm


def autocast_dtype(precision: str) -> torch.dtype | None:
    """What the forward autocasts to; None under fp32."""
    return {"fp32": None, "bf16": torch.bfloat16, "fp8": torch.bfloat16}[precision]


def training_autocast(device: torch.device, precision: str) -> torch.autocast:
    """Around a forward that a backward follows.

    Without autocast's cache: it would keep the narrow copy of every linear's weight until the forward ends, even where
    layers are checkpointed. Copies that a backward needs autograd keeps by itself. A weight that a forward uses twice
    is narrowed twice.
    """
    dtype = autocast_dtype(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False)


def fp8_backend(precision: str, device: torch.device) -> str | None:
    """How FP8 linears run on `device`: by cuBLAS on Hopper, emulated elsewhere; None where there are none."""
    if precision != "fp8":
        return None
    return "scaled_mm" if has_block_scaled_mm(device) else "emulate"
