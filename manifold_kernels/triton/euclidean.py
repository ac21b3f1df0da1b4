"""All of R^{n x p}: the direction is its own projection, and a step is a sum."""

from __future__ import annotations

import triton
import triton.language as tl

from manifold_kernels.triton.small import add_scaled, inner


@triton.jit
def project(q, d, N: tl.constexpr, P: tl.constexpr):
    return d, inner(d, d)


@triton.jit
def retract_add(q, xi, step, square, N: tl.constexpr, P: tl.constexpr):
    """``q + step xi``."""
    return add_scaled(q, step, xi)
