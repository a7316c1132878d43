"""How the ops run: which backend, how much workspace, which precision. One object, made once from the configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OpSettings:
    """`backend` torch | triton; `workspace` bytes that one op may hold beside its inputs, outputs and gradients;
    `deterministic`: Triton's backward passes add in a fixed order instead of with atomics; `fp8_index`: the selection
    is scored in FP8, as DeepSeek-V3.2 does at inference; `fp8_linear`: how the linears that DeepSeek stores in FP8 run
    their products in it, emulate | scaled_mm, or None: in the dtype at hand."""

    backend: str = "torch"
    workspace: int = 256 << 20
    deterministic: bool = False
    fp8_index: bool = False
    fp8_linear: str | None = None


DEFAULT = OpSettings()
