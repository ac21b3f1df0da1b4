"""Numbers on lanes: exact scaling by powers of two, and rounding that the compiler cannot change.

``MAX_EXPONENT`` and the like are per type; everything works on blocks of any shape in float32 or float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def finite(x):
    """Which elements are neither NaN nor Inf."""
    return tl.abs(x) < INFINITY


@triton.jit
def power_of_two(top):
    """``(c, 1/c)``, both powers of two, with ``c <= top < 2 c`` where c lies within 2^+-100 (2^+-900 in float64).

    Dividing by c is exact, and neither squares of numbers up to ``top/c`` nor their sums leave the type.
    """
    if top.dtype == tl.float64:
        bits = top.to(tl.int64, bitcast=True) & 0x7FF0000000000000
        bits = tl.minimum(tl.maximum(bits, 0x07B0000000000000), 0x7830000000000000)  # 2^-900, 2^900
        return bits.to(tl.float64, bitcast=True), (0x7FE0000000000000 - bits).to(tl.float64, bitcast=True)
    else:
        bits = top.to(tl.int32, bitcast=True) & 0x7F800000
        bits = tl.minimum(tl.maximum(bits, 0x0D800000), 0x71800000)  # 2^-100, 2^100
        return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def divide(x, y):
    """``x/y``, rounded once."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def root(x):
    """The square root, rounded once."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def inverse_root(x):
    """``1/sqrt(x)``, and 1 where x is 0."""
    safe = tl.where(x > 0, x, 1.0)
    return divide(tl.full(x.shape, 1.0, x.dtype), root(safe))
