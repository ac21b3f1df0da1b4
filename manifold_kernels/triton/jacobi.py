"""The polar factor by one-sided Jacobi rotations (Hestenes): rows are turned in pairs until they are orthogonal.

Blocks ``(lanes, size, size)``; all pairs (i, i xor m) are turned at once, m = 1, 2, ..., so that a sweep meets every
pair once. A lane whose rows are orthogonal stays as it is, whatever its neighbours need.
"""

from __future__ import annotations

import triton
import triton.language as tl

from manifold_kernels.triton import householder
from manifold_kernels.triton.arithmetic import divide, inverse_root, root
from manifold_kernels.triton.batched import gram, identity, product, transpose


@triton.jit
def rotate(y, SIZE: tl.constexpr):
    """``(V^T Y, V^T)`` with orthogonal rows of ``V^T Y``, for Y of size one.

    Every pair is accurate to rounding relative to its own rows, so that a long one does not spoil a short one. Rows
    whose square is below eps^3 are nothing beside the others and are not turned by themselves.
    """
    EPS: tl.constexpr = 2.0**-52 if y.dtype == tl.float64 else 2.0**-23
    row = tl.arange(0, y.shape[1])
    turns = identity(y, SIZE)
    worst = 1
    sweeps = 0
    # Convergence is quadratic; 30 sweeps are never reached by finite input.
    while (worst > 0) & (sweeps < 30):
        worst = 0
        for m in range(1, y.shape[1]):
            partner = tl.broadcast_to((row ^ m)[None, :, None], y.shape)
            other_y = tl.gather(y, partner, 1)
            other_turns = tl.gather(turns, partner, 1)
            first = (row < (row ^ m))[None, :]
            own, other, both = tl.sum(y * y, 2), tl.sum(other_y * other_y, 2), tl.sum(y * other_y, 2)
            size = root(tl.maximum(own, EPS * EPS * EPS)) * root(tl.maximum(other, EPS * EPS * EPS))
            still = ~(tl.abs(both) > 4.0 * EPS * size)
            worst = tl.maximum(worst, tl.max(tl.max((~still).to(tl.int32), 1), 0))
            # tan of the angle: the smaller root of t^2 + 2 zeta t - 1 = 0, the same for both of a pair
            zeta = divide(tl.where(first, other - own, own - other), 2.0 * tl.where(still, 1.0, both))
            t = divide(tl.full(zeta.shape, 1.0, y.dtype), tl.abs(zeta) + root(tl.fma(zeta, zeta, 1.0)))
            t = tl.where(still, 0.0, tl.where(zeta < 0, -t, t))
            c = inverse_root(tl.fma(t, t, 1.0))
            s = tl.where(first, -(c * t), c * t)
            y = tl.fma(c[:, :, None], y, s[:, :, None] * other_y)
            turns = tl.fma(c[:, :, None], turns, s[:, :, None] * other_turns)
        sweeps += 1
    return y, turns


@triton.jit
def completed(u, turns, missing, SIZE: tl.constexpr):
    """Rows of U that are ``missing`` become some orthonormal completion of the others.

    Of U and V only ``V U^T`` matters, so that both put them behind the others first: a QR decomposition keeps
    orthonormal columns and goes on from there.
    """
    at = tl.arange(0, u.shape[1])
    lost = missing & (at < SIZE)[None, :]
    kept = (~missing) & (at < SIZE)[None, :]
    before = tl.cumsum(kept.to(tl.int32), 1) - kept.to(tl.int32)
    after = tl.cumsum(lost.to(tl.int32), 1) - lost.to(tl.int32) + tl.sum(kept.to(tl.int32), 1)[:, None]
    place = tl.where(kept, before, tl.where(lost, after, at[None, :]))
    order = (place[:, :, None] == at[None, None, :]).to(u.dtype)  # row i goes to place[i]
    u = gram(order, tl.where(missing[:, :, None], 0.0, u), SIZE)
    turns = gram(order, turns, SIZE)
    return transpose(householder.qf(transpose(u), SIZE)), turns


@triton.jit
def polar_factor(y, SIZE: tl.constexpr):
    """The orthonormal polar factor of square matrices of size one: ``V U^T`` where ``V^T Y = S U^T``.

    Singular values below rounding of the largest leave no direction in U, and any completion is as good.
    """
    EPS: tl.constexpr = 2.0**-52 if y.dtype == tl.float64 else 2.0**-23
    at = tl.arange(0, y.shape[1])
    y, turns = rotate(y, SIZE)
    square = tl.sum(y * y, 2)
    missing = (square < EPS * EPS * EPS) & (at < SIZE)[None, :]
    u = y * inverse_root(square)[:, :, None]
    deficient = tl.max(missing.to(tl.int32), 1)
    if tl.max(deficient, 0) > 0:
        whole, sorted_turns = completed(u, turns, missing, SIZE)
        u = tl.where((deficient > 0)[:, None, None], whole, u)
        turns = tl.where((deficient > 0)[:, None, None], sorted_turns, turns)
    z = gram(turns, u, SIZE)
    # The rounding errors of all rotations, out in one step.
    return z + 0.5 * product(z, identity(z, SIZE) - gram(z, z, SIZE), SIZE)
