"""Every column has norm s: one sphere per column, in units of s."""

from __future__ import annotations

import triton
import triton.language as tl

from manifold_kernels.triton import sphere
from manifold_kernels.triton.small import column, inner, transpose


@triton.jit
def project(q, d, N: tl.constexpr, P: tl.constexpr):
    """The sphere's projection of every column, and ``||xi||^2`` of the matrix."""
    columns = ()
    total = q[0] * 0.0
    for j in tl.static_range(P):
        xi, square = sphere.project(column(q, j, N, P), column(d, j, N, P), N, 1)
        columns = columns + xi
        total += square
    return transpose(columns, P, N), total


@triton.jit
def retract(q, xi, step, arc: tl.constexpr, N: tl.constexpr, P: tl.constexpr):
    columns = ()
    for j in tl.static_range(P):
        v = column(xi, j, N, P)
        columns = columns + sphere.retract(column(q, j, N, P), v, step, inner(v, v), arc, N, 1)
    return transpose(columns, P, N)


@triton.jit
def retract_projection(q, xi, step, square, N: tl.constexpr, P: tl.constexpr):
    return retract(q, xi, step, sphere.projection, N, P)


@triton.jit
def retract_exp(q, xi, step, square, N: tl.constexpr, P: tl.constexpr):
    return retract(q, xi, step, sphere.exp, N, P)
