"""Products of small matrices in blocks ``(lanes, rows, columns)``, row by row and column by column: any size."""

from __future__ import annotations

import triton
import triton.language as tl


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
    at = tl.arange(0, a.shape[2])
    row = tl.arange(0, b.shape[1])
    total = tl.zeros((a.shape[0], a.shape[1], b.shape[2]), a.dtype)
    for k in range(INNER):
        total = tl.fma(column_of(a, at, k)[:, :, None], row_of(b, row, k)[:, None, :], total)
    return total


@triton.jit
def gram(a, b, INNER: tl.constexpr):
    """``A^T B`` by the first ``INNER`` rows of both."""
    row = tl.arange(0, a.shape[1])
    total = tl.zeros((a.shape[0], a.shape[2], b.shape[2]), a.dtype)
    for k in range(INNER):
        total = tl.fma(row_of(a, row, k)[:, :, None], row_of(b, row, k)[:, None, :], total)
    return total


@triton.jit
def identity(like, SIZE: tl.constexpr):
    """The identities of ``SIZE`` dimensions, in blocks of the shape of ``like``."""
    row = tl.arange(0, like.shape[1])
    at = tl.arange(0, like.shape[2])
    one = ((row[:, None] == at[None, :]) & (at < SIZE)[None, :]).to(like.dtype)
    return tl.broadcast_to(one[None, :, :], like.shape)
