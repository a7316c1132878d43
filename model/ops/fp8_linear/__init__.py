from model.ops.fp8_linear.op import fp8_grouped_linear, fp8_linear, fp8_round_weight, has_block_scaled_mm

__all__ = ["fp8_grouped_linear", "fp8_linear", "fp8_round_weight", "has_block_scaled_mm"]
