"""QR decompositions by Householder reflections: of any matrix, whatever its rank. Blocks ``(lanes, rows, columns)``."""

from __future__ import annotations

import triton
import triton.language as tl

from manifold_kernels.triton.arithmetic import divide, root
from manifold_kernels.triton.batched import column_of


@triton.jit
def factor(y, RANK: tl.constexpr, WIDTH: tl.constexpr):
    """``RANK`` reflections of matrices whose columns are of size one at most.

    Returns R with the reflectors below its diagonal, whose heads are 1, their factors ``tau``, and the signs that make
    the diagonal >= 0: R has them already, the ``WIDTH`` columns of Q need them. What is left of a column that has lost
    all of its digits is taken for zero, where its square would be a denormal.
    """
    TINY: tl.constexpr = 1e-280 if y.dtype == tl.float64 else 1e-30
    row = tl.arange(0, y.shape[1])
    at = tl.arange(0, y.shape[2])
    to = tl.arange(0, WIDTH)
    taus = tl.zeros((y.shape[0], WIDTH), y.dtype)
    signs = tl.full((y.shape[0], WIDTH), 1.0, y.dtype)
    for k in range(RANK):
        column = column_of(y, at, k)
        below = tl.where(row[None, :] > k, column, 0.0)
        head = tl.sum(tl.where(row[None, :] == k, column, 0.0), 1)
        square = tl.fma(head, head, tl.sum(below * below, 1))
        zero = square < TINY
        length = root(tl.where(zero, 1.0, square))
        side = tl.where(head < 0, -length, length)
        inverse = tl.where(zero, 0.0, divide(tl.full(square.shape, 1.0, y.dtype), head + side))
        tau = tl.where(zero, 0.0, 1.0 + divide(tl.abs(head), length))
        v = tl.where(row[None, :] == k, 1.0, below * inverse[:, None])
        along = tl.sum(v[:, :, None] * y, 1)
        turned = tl.fma(-(tau[:, None] * v)[:, :, None], along[:, None, :], y)
        diagonal = tl.where(zero, head, -side)
        done = tl.where(row[None, :] < k, column, tl.where(row[None, :] == k, diagonal[:, None], v))
        y = tl.where(at[None, None, :] > k, turned, tl.where(at[None, None, :] == k, done[:, :, None], y))
        sign = tl.where(diagonal < 0, -1.0, 1.0)
        own = (row[None, :, None] == k) & (at[None, None, :] >= k)
        y = tl.where(own, y * sign[:, None, None], y)
        taus = tl.where(to[None, :] == k, tau[:, None], taus)
        signs = tl.where(to[None, :] == k, sign[:, None], signs)
    return y, taus, signs


@triton.jit
def basis(y, taus, signs, RANK: tl.constexpr):
    """Q of what :func:`factor` returns: ``RANK`` orthonormal columns, whatever the matrices were."""
    row = tl.arange(0, y.shape[1])
    at = tl.arange(0, y.shape[2])
    to = tl.arange(0, taus.shape[1])
    q = ((row[:, None] == to[None, :]) & (to < RANK)[None, :]).to(y.dtype)[None, :, :] + taus[:, None, :] * 0.0
    for back in range(RANK):
        k = RANK - 1 - back
        column = column_of(y, at, k)
        v = tl.where(row[None, :] == k, 1.0, tl.where(row[None, :] > k, column, 0.0))
        tau = tl.sum(tl.where(to[None, :] == k, taus, 0.0), 1)
        along = tl.sum(v[:, :, None] * q, 1)
        q = tl.fma(-(tau[:, None] * v)[:, :, None], along[:, None, :], q)
    return q * signs[:, None, :]


@triton.jit
def qf(y, RANK: tl.constexpr):
    """The Q factor with a positive diagonal of R."""
    y, taus, signs = factor(y, RANK, y.shape[2])
    return basis(y, taus, signs, RANK)
