"""Orthonormalisation and linear systems by Givens rotations of small matrices: no pivoting, no branch on data."""

from __future__ import annotations

import triton
import triton.language as tl

from manifold_kernels.triton.arithmetic import divide, inverse_root
from manifold_kernels.triton.small import identity


@triton.jit
def rotation(a, b):
    """``(c, s)`` with ``[c s; -s c]`` turning (a, b) into (r, 0), r >= 0; the identity where both are nearly zero.

    Dividing by a denormal square would lose orthogonality.
    """
    TINY: tl.constexpr = 1e-280 if a.dtype == tl.float64 else 1e-30
    square = tl.fma(a, a, b * b)
    zero = square < TINY
    inverse = inverse_root(tl.where(zero, 1.0, square))
    return tl.where(zero, 1.0, a * inverse), tl.where(zero, 0.0, b * inverse)


@triton.jit
def rotate(y, upper: tl.constexpr, lower: tl.constexpr, first: tl.constexpr, P: tl.constexpr, c, s):
    """Rows ``upper`` and ``lower = upper + 1`` of y, P wide, turned by (c, s) from column ``first`` on."""
    above = y[upper * P : upper * P + first]
    below = y[lower * P : lower * P + first]
    for k in tl.static_range(first, P):
        a, b = y[upper * P + k], y[lower * P + k]
        above = above + (tl.fma(c, a, s * b),)
        below = below + (tl.fma(c, b, -(s * a)),)
    return y[: upper * P] + above + below + y[(lower + 1) * P :]


@triton.jit
def qf(y, N: tl.constexpr, P: tl.constexpr):
    """Q (``N x P``) of the thin QR decomposition of y, ``N >= P``, diagonal of R >= 0."""
    cs = ()
    for j in tl.static_range(P):
        for i in tl.static_range(N - 1, j, -1):
            c, s = rotation(y[(i - 1) * P + j], y[i * P + j])
            cs = cs + ((c, s),)
            y = rotate(y, i - 1, i, j, P, c, s)
    one = identity(y[0], N)
    q = ()
    for i in tl.static_range(N):
        q = q + one[i * N : i * N + P]
    if N == P:
        # The last diagonal element of a square R is the only one that no rotation has made >= 0.
        q = q[: N * P - 1] + (tl.where(y[N * P - 1] < 0, -one[0], one[0]),)
    for j in tl.static_range(P - 1, -1, -1):
        for i in tl.static_range(j + 1, N):
            # Rotations of columns 0 to j - 1 come first, N - 1 - k of column k; in column j they run upwards.
            c, s = cs[j * (N - 1) - j * (j - 1) // 2 + N - 1 - i]
            q = rotate(q, i - 1, i, j, P, c, -s)
    return q


@triton.jit
def solve(a, b, N: tl.constexpr, P: tl.constexpr):
    """X (``N x P``) with ``A X = B`` for a well-conditioned A (``N x N``)."""
    for j in tl.static_range(N):
        for i in tl.static_range(N - 1, j, -1):
            c, s = rotation(a[(i - 1) * N + j], a[i * N + j])
            a = rotate(a, i - 1, i, j, N, c, s)
            b = rotate(b, i - 1, i, 0, P, c, s)
    x = ()
    for i in tl.static_range(N - 1, -1, -1):
        row = ()
        for k in tl.static_range(P):
            rest = b[i * P + k]
            for known in tl.static_range(i + 1, N):
                rest = tl.fma(-a[i * N + known], x[(known - i - 1) * P + k], rest)
            row = row + (divide(rest, a[i * N + i]),)
        x = row + x
    return x
