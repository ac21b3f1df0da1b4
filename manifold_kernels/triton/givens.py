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
def rotate(above, below, c, s):
    """Two rows turned by (c, s)."""
    upper = ()
    lower = ()
    for k in tl.static_range(len(above)):
        upper = upper + (tl.fma(c, above[k], s * below[k]),)
        lower = lower + (tl.fma(c, below[k], -(s * above[k])),)
    return upper, lower


@triton.jit
def rows(a, N: tl.constexpr, P: tl.constexpr):
    """A tuple of rows, which are cheaper to replace one by one."""
    out = ()
    for i in tl.static_range(N):
        out = out + (a[i * P : (i + 1) * P],)
    return out


@triton.jit
def flat(a):
    out = ()
    for i in tl.static_range(len(a)):
        out = out + a[i]
    return out


@triton.jit
def qf(y, N: tl.constexpr, P: tl.constexpr):
    """Q (``N x P``) of the thin QR decomposition of y, ``N >= P``, diagonal of R >= 0."""
    q = identity(y[0], N)
    y = rows(y, N, P)
    cs = ()
    for j in tl.static_range(P):
        for i in tl.static_range(N - 1, j, -1):
            c, s = rotation(y[i - 1][j], y[i][j])
            cs = cs + ((c, s),)
            # What lies left of column j is zero by now, and not looked at again.
            upper, lower = rotate(y[i - 1][j:], y[i][j:], c, s)
            y = y[: i - 1] + (y[i - 1][:j] + upper, y[i][:j] + lower) + y[i + 1 :]
    q = rows(q, N, N)
    if N == P:
        # The last diagonal element of a square R is the only one that no rotation has made >= 0.
        q = q[: N - 1] + (q[N - 1][: N - 1] + (tl.where(y[N - 1][N - 1] < 0, -1.0, q[0][0]),),)
    for j in tl.static_range(P - 1, -1, -1):
        for i in tl.static_range(j + 1, N):
            # Rotations of columns 0 to j - 1 come first, N - 1 - k of column k; in column j they run upwards.
            c, s = cs[j * (N - 1) - j * (j - 1) // 2 + N - 1 - i]
            upper, lower = rotate(q[i - 1][j:P], q[i][j:P], c, -s)
            q = q[: i - 1] + (q[i - 1][:j] + upper + q[i - 1][P:], q[i][:j] + lower + q[i][P:]) + q[i + 1 :]
    out = ()
    for i in tl.static_range(N):
        out = out + q[i][:P]
    return out


@triton.jit
def solve(a, b, N: tl.constexpr, P: tl.constexpr):
    """X (``N x P``) with ``A X = B`` for a well-conditioned A (``N x N``)."""
    a, b = rows(a, N, N), rows(b, N, P)
    for j in tl.static_range(N):
        for i in tl.static_range(N - 1, j, -1):
            c, s = rotation(a[i - 1][j], a[i][j])
            upper, lower = rotate(a[i - 1][j:], a[i][j:], c, s)
            a = a[: i - 1] + (a[i - 1][:j] + upper, a[i][:j] + lower) + a[i + 1 :]
            upper, lower = rotate(b[i - 1], b[i], c, s)
            b = b[: i - 1] + (upper, lower) + b[i + 1 :]
    x = ()
    for i in tl.static_range(N - 1, -1, -1):
        row = ()
        for k in tl.static_range(P):
            rest = b[i][k]
            for known in tl.static_range(i + 1, N):
                rest = tl.fma(-a[i][known], x[known - i - 1][k], rest)
            row = row + (divide(rest, a[i][i]),)
        x = (row,) + x
    return flat(x)
