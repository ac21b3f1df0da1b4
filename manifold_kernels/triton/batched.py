"""Products of matrices in blocks ``(lanes, rows, columns)``. Never TF32: digits matter."""

from __future__ import annotations

import triton
import triton.language as tl

from manifold_kernels.triton.support import interpreted

#: Sides of matrices whose products are taken at once: ``tl.dot`` pads smaller ones, and larger ones do not fit in
#: registers beside the others of a step. The interpreter pays by the operation, whatever its size.
SMALLEST, LARGEST = (tl.constexpr(1), tl.constexpr(1024)) if interpreted() else (tl.constexpr(16), tl.constexpr(16))


@triton.jit
def column_of(block, at, k):
    """Column k of every matrix, ``at`` the indices of columns."""
    return tl.sum(tl.where(at[None, None, :] == k, block, 0.0), 2)


@triton.jit
def row_of(block, at, k):
    """Row k of every matrix, ``at`` the indices of rows."""
    return tl.sum(tl.where(at[None, :, None] == k, block, 0.0), 1)


@triton.jit
def product(a, b, INNER: tl.constexpr):
    """``A B`` by the first ``INNER`` columns of A and rows of B; the others are padding."""
    if min(a.shape[1], a.shape[2], b.shape[2]) >= SMALLEST and max(a.shape[1], a.shape[2], b.shape[2]) <= LARGEST:
        total = tl.dot(a, b, input_precision="ieee", out_dtype=a.dtype)
    else:
        at = tl.arange(0, a.shape[2])
        row = tl.arange(0, b.shape[1])
        total = tl.zeros((a.shape[0], a.shape[1], b.shape[2]), a.dtype)
        for k in range(INNER):
            total = tl.fma(column_of(a, at, k)[:, :, None], row_of(b, row, k)[:, None, :], total)
    return total


@triton.jit
def gram(a, b, INNER: tl.constexpr):
    """``A^T B`` by the first ``INNER`` rows of both."""
    if min(a.shape[1], a.shape[2], b.shape[2]) >= SMALLEST and max(a.shape[1], a.shape[2], b.shape[2]) <= LARGEST:
        total = tl.dot(transpose(a), b, input_precision="ieee", out_dtype=a.dtype)
    else:
        row = tl.arange(0, a.shape[1])
        total = tl.zeros((a.shape[0], a.shape[2], b.shape[2]), a.dtype)
        for k in range(INNER):
            total = tl.fma(row_of(a, row, k)[:, :, None], row_of(b, row, k)[:, None, :], total)
    return total


@triton.jit
def transpose(a):
    return tl.trans(a, 0, 2, 1)


@triton.jit
def identity(like, SIZE: tl.constexpr):
    """The identities of ``SIZE`` dimensions, in blocks of the shape of ``like``."""
    row = tl.arange(0, like.shape[1])
    at = tl.arange(0, like.shape[2])
    one = ((row[:, None] == at[None, :]) & (at < SIZE)[None, :]).to(like.dtype)
    return tl.broadcast_to(one[None, :, :], like.shape)
