"""Kernels of the QR and polar decompositions of any finite matrices: a program holds a block of them."""

from __future__ import annotations

import triton
import triton.language as tl

from manifold_kernels.triton import householder, jacobi
from manifold_kernels.triton.arithmetic import finite, power_of_two
from manifold_kernels.triton.batched import product


@triton.jit
def places(count, N: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr):
    """Offsets and mask of this program's matrices ``N x P``, which lie one after the other."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    row = tl.arange(0, ROWS)
    at = tl.arange(0, COLUMNS)
    mask = (lane < count)[:, None, None] & ((row < N)[:, None] & (at < P)[None, :])[None, :, :]
    return lane.to(tl.int64)[:, None, None] * (N * P) + (row[:, None] * P + at[None, :])[None, :, :], mask


@triton.jit
def load(x, count, N: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr):
    """The matrices, and which of them are finite; the others are taken for zero."""
    offsets, mask = places(count, N, P, ROWS, COLUMNS, LANES)
    y = tl.load(x + offsets, mask=mask, other=0.0)
    ok = (tl.max(tl.max((~finite(y)).to(tl.int32), 2), 1) == 0)[:, None, None]
    return tl.where(ok, y, 0.0), ok


@triton.jit
def store(to, block, count, N: tl.constexpr, P: tl.constexpr):
    offsets, mask = places(count, N, P, block.shape[1], block.shape[2], block.shape[0])
    tl.store(to + offsets, block, mask=mask)


@triton.jit
def size_one(top):
    """Powers of two ``(a, b)`` and their inverses: numbers up to ``top`` times a and b are of size one.

    Two of them, since the one for a denormal number, or its inverse, is none of the type's normal numbers.
    """
    FAR: tl.constexpr = 2.0**600 if top.dtype == tl.float64 else 2.0**70
    NEAR: tl.constexpr = 1.0 / FAR
    a = tl.where(top > FAR, NEAR, tl.where(top < NEAR, FAR, 1.0))
    inverse_a = tl.where(top > FAR, FAR, tl.where(top < NEAR, NEAR, 1.0))
    inverse_b, b = power_of_two(top * a)
    return a, b, inverse_a, inverse_b


@triton.jit(do_not_specialize=["count"])
def qr(
    x,
    q,
    r,
    count,
    N: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    WITH_R: tl.constexpr,
):
    """Q, and R ``WITH_R``. Columns are brought to size one by powers of two, which Q does not feel."""
    RANK: tl.constexpr = min(N, P)
    y, ok = load(x, count, N, P, ROWS, COLUMNS, LANES)
    a, b, inverse_a, inverse_b = size_one(tl.max(tl.abs(y), 1)[:, None, :])
    y, taus, signs = householder.factor(y * a * b, RANK, ROWS if N < P else COLUMNS)
    basis = householder.basis(y, taus, signs, RANK)
    store(q, tl.where(ok, basis, float("nan")), count, N, RANK)
    if WITH_R:
        above = (tl.arange(0, ROWS)[:, None] <= tl.arange(0, COLUMNS)[None, :])[None, :, :]
        upper = tl.where(ok, y * inverse_b * inverse_a, float("nan"))
        store(r, tl.where(above, upper, 0.0), count, RANK, P)


@triton.jit(do_not_specialize=["count"])
def polar(
    x,
    q,
    count,
    N: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The polar factor of matrices with N >= P: with ``A = Q R`` it is Q times the polar factor of R."""
    y, ok = load(x, count, N, P, ROWS, COLUMNS, LANES)
    a, b, _, _ = size_one(tl.max(tl.max(tl.abs(y), 2), 1)[:, None, None])
    y, taus, signs = householder.factor(y * a * b, P, COLUMNS)
    basis = householder.basis(y, taus, signs, P)
    row = tl.arange(0, COLUMNS)
    if ROWS > COLUMNS:
        y = tl.gather(y, tl.broadcast_to(row[None, :, None], (LANES, COLUMNS, COLUMNS)), 1)
    upper = tl.where((row[:, None] <= row[None, :])[None, :, :], y, 0.0)
    z = product(basis, jacobi.polar_factor(upper, P), P)
    store(q, tl.where(ok, z, float("nan")), count, N, P)
