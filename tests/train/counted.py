"""The model of tests that count FLOPs; what runs beyond the formulas is bench/plan_flops.py's."""

from __future__ import annotations

from dataclasses import replace

from tests.model import tiny

# 18 is no multiple of 16 bytes, so experts run as one counted product each instead of as a grouped one
MODEL = replace(tiny.CONFIG, moe_intermediate_size=18)
