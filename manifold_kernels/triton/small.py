"""Small matrices as row-major tuples of lanes, unrolled: every lane is a matrix."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def inner(a, b):
    """``<a, b>`` of tuples of one length."""
    total = a[0] * b[0]
    for e in tl.static_range(1, len(a)):
        total = tl.fma(a[e], b[e], total)
    return total


@triton.jit
def scale(a, factor):
    out = ()
    for e in tl.static_range(len(a)):
        out = out + (a[e] * factor,)
    return out


@triton.jit
def column(a, j: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    """Column j of an ``N x P`` matrix."""
    out = ()
    for i in tl.static_range(N):
        out = out + (a[i * P + j],)
    return out


@triton.jit
def transpose(a, N: tl.constexpr, P: tl.constexpr):
    out = ()
    for j in tl.static_range(P):
        out = out + column(a, j, N, P)
    return out


@triton.jit
def add_scaled(a, factor, b):
    """``a + factor b``."""
    out = ()
    for e in tl.static_range(len(a)):
        out = out + (tl.fma(b[e], factor, a[e]),)
    return out


@triton.jit
def multiply(a, b, N: tl.constexpr, K: tl.constexpr, P: tl.constexpr):
    """``A B`` for A ``N x K``, B ``K x P``."""
    out = ()
    for i in tl.static_range(N):
        for j in tl.static_range(P):
            total = a[i * K] * b[j]
            for k in tl.static_range(1, K):
                total = tl.fma(a[i * K + k], b[k * P + j], total)
            out = out + (total,)
    return out


@triton.jit
def identity(like, N: tl.constexpr):
    out = ()
    for e in tl.static_range(N * N):
        out = out + (tl.full(like.shape, 1.0 if e % (N + 1) == 0 else 0.0, like.dtype),)
    return out


@triton.jit
def select(mask, a, b):
    """``a`` on the lanes of ``mask``, ``b`` on the others."""
    out = ()
    for e in tl.static_range(len(a)):
        out = out + (tl.where(mask, a[e], b[e]),)
    return out
