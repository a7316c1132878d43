"""What `precision` means: fp32, bf16 (parameters stay fp32, matrix products run in bf16), or fp8 (as bf16, and the
linears that DeepSeek stores in FP8 run their products in block-scaled e4m3; `model/layers.py` lists them)."""

from __future__ import annotations

import torch

from model.ops.fp8_linear import has_block_scaled_mm


def autocast_dtype(precision: str) -> torch.dtype | None:
    """What the forward autocasts to; None under fp32."""
    return {"fp32": None, "bf16": torch.bfloat16, "fp8": torch.bfloat16}[precision]


def fp8_backend(precision: str, device: torch.device) -> str | None:
    """How FP8 linears run on `device`: by cuBLAS on Hopper, emulated elsewhere; None where there are none."""
    if precision != "fp8":
        return None
    return "scaled_mm" if has_block_scaled_mm(device) else "emulate"
