"""``||W||_F = s``, in units of s: points q, ambient d, tangent xi on tuples of lanes; arcs are for all vectors."""

from __future__ import annotations

import triton
import triton.language as tl

from manifold_kernels.triton.arithmetic import divide, inverse_root, root
from manifold_kernels.triton.small import inner, scale


@triton.jit
def project(q, d, N: tl.constexpr, P: tl.constexpr):
    """``xi = d - q <q, d>`` ([FG] Table VII, corrected) and ``||xi||^2``."""
    along = inner(q, d)
    xi = ()
    for e in tl.static_range(N * P):
        xi = xi + (tl.fma(-along, q[e], d[e]),)
    return xi, inner(xi, xi)


@triton.jit
def projection(step, square):
    """``(q + v)/||q + v||``: a and b of the arc ``a q + b xi``, to be normalised, for ``v = step xi``."""
    return tl.full(square.shape, 1.0, square.dtype), step + square * 0.0


@triton.jit
def exp(step, square):
    """``q cos||v|| + v/||v|| sin||v||``. The quotient is a sinc: ``v = 0`` gives q."""
    length = root(square)
    angle = tl.abs(step) * length
    sine = divide(tl.sin(angle), tl.where(length > 0, length, 1.0))
    return tl.cos(angle), tl.where(length > 0, tl.where(step < 0, -sine, sine), step)


@triton.jit
def cayley(step, square):
    """The Cayley transform of a single column, a turn by ``2 atan(||v||/2)``: ``a = 1 - ||v||^2/4``, ``b = step``."""
    half = step * root(square) * 0.5
    return 1.0 - half * half, step + square * 0.0


@triton.jit
def retract(q, xi, step, square, arc: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    """The point of the arc, normalised; a zero vector stays zero."""
    a, b = arc(step, square)
    y = ()
    for e in tl.static_range(N * P):
        y = y + (tl.fma(b, xi[e], a * q[e]),)
    return scale(y, inverse_root(inner(y, y)))


@triton.jit
def retract_projection(q, xi, step, square, N: tl.constexpr, P: tl.constexpr):
    return retract(q, xi, step, square, projection, N, P)


@triton.jit
def retract_exp(q, xi, step, square, N: tl.constexpr, P: tl.constexpr):
    return retract(q, xi, step, square, exp, N, P)
