"""The three products of an FP8 linear by brute force: block after block in numpy, sums in fp64. It is the definition.

Scales and quotients are fp32, as on the hardware; e4m3 is rounded here from the format itself (1 sign, 4 exponent and 3
mantissa bits, bias 7, largest 448), not by torch's cast. The blocks of every product are written out in its own
orientation: nothing is transposed before it is rounded.
"""

from __future__ import annotations

import math

import numpy as np

BLOCK, LARGEST = 128, 448.0


def e4m3(x: np.ndarray) -> np.ndarray:
    """x of any shape -> fp64: the nearest e4m3 number, ties to the even mantissa; NaN where that would be above 448."""
    x = x.astype(np.float64)
    exponent = np.frexp(x)[1] - 1  # |x| in [2^exponent, 2^(exponent + 1))
    step = np.exp2(np.maximum(exponent, -6) - 3)  # below 2^-6 the numbers lie as far apart as just above it
    rounded = np.rint(x / step) * step
    return np.where(np.abs(rounded) <= LARGEST, rounded, np.nan)


def scale_of(block: np.ndarray, power_of_two: bool) -> np.float32:
    """What the rounded numbers of this fp32 block are multiplied by."""
    amax = np.abs(block).max()
    if amax == 0:
        return np.float32(1)
    scale = amax / np.float32(LARGEST)
    return np.float32(2.0 ** math.ceil(math.log2(scale))) if power_of_two else scale


def rounded(x: np.ndarray, rows: int, columns: int, power_of_two: bool = False) -> np.ndarray:
    """x fp32 [R, C] -> what e4m3 leaves of it, fp64 [R, C], with one scale for every block of rows x columns."""
    found = np.full(x.shape, np.nan)
    for r in range(0, x.shape[0], rows):
        for c in range(0, x.shape[1], columns):
            block = x[r : r + rows, c : c + columns]
            scale = scale_of(block, power_of_two)
            found[r : r + rows, c : c + columns] = e4m3(np.clip(block / scale, -LARGEST, LARGEST)) * np.float64(scale)
    return found


def forward(x: np.ndarray, weight: np.ndarray, power_of_two: bool = False) -> np.ndarray:
    """x [M, K], weight [N, K], both fp32 -> y [M, N] fp64. The sum runs over K: so do x's tiles."""
    return rounded(x, 1, BLOCK, power_of_two) @ rounded(weight, BLOCK, BLOCK, power_of_two).T


def gradients(
    x: np.ndarray, weight: np.ndarray, grad: np.ndarray, power_of_two: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """grad = dL/dy [M, N] fp32 -> dL/dx [M, K] (sum over N) and dL/dweight [N, K] (sum over the M tokens), fp64."""
    d_x = rounded(grad, 1, BLOCK, power_of_two) @ rounded(weight, BLOCK, BLOCK, power_of_two)
    d_weight = rounded(grad, BLOCK, 1, power_of_two).T @ rounded(x, BLOCK, 1, power_of_two)
    return d_x, d_weight
