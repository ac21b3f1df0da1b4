"""``W^T W = s^2 I`` for N >= P, in units of s: points q, ambient d, tangent xi, on tuples of lanes."""

from __future__ import annotations

import triton
import triton.language as tl

from manifold_kernels.triton import givens
from manifold_kernels.triton.arithmetic import divide, root
from manifold_kernels.triton.small import add_scaled, identity, inner, multiply, scale, select, transpose


@triton.jit
def symmetric(a, N: tl.constexpr, sign: tl.constexpr):
    """``(A + sign A^T)/2``."""
    out = ()
    for i in tl.static_range(N):
        for j in tl.static_range(N):
            out = out + (0.5 * (a[i * N + j] + sign * a[j * N + i]),)
    return out


@triton.jit
def project(q, d, N: tl.constexpr, P: tl.constexpr):
    """``xi = d - q sym(q^T d)`` ([FG] Table VII, corrected) and ``||xi||^2``."""
    a = symmetric(multiply(transpose(q, N, P), d, P, N, P), P, 1)
    xi = add_scaled(d, -1.0, multiply(q, a, N, P, P))
    return xi, inner(xi, xi)


@triton.jit
def retract_qr(q, xi, step, square, N: tl.constexpr, P: tl.constexpr):
    """``qf(q + step xi)``."""
    return givens.qf(add_scaled(q, step, xi), N, P)


@triton.jit
def polar(y, N: tl.constexpr, P: tl.constexpr):
    """``Y (Y^T Y)^{-1/2}`` by Newton-Schulz iterations ``X <- X (3 I - X^T X)/2``, which need ``||X||_2 < sqrt(3)``.

    A lane that has converged stays as it is, whatever its neighbours need. The error squares with every iteration: one
    more after it is below the root of eps leaves it below eps.
    """
    ENOUGH: tl.constexpr = 1e-16 if y[0].dtype == tl.float64 else 1e-7
    one = identity(y[0], P)
    square = inner(y, y)
    gram = multiply(transpose(y, N, P), y, P, N, P)
    off = add_scaled(gram, -1.0, one)
    far = inner(off, off) > 0.5
    x = scale(y, tl.where(far, divide(tl.full(square.shape, 1.7, square.dtype), root(tl.where(far, square, 1.0))), 1.0))
    distance = square * 0.0 + 1.0
    moving = distance > 0.0
    rounds = 0
    # The longest step, of condition number 2^27, takes 47 iterations and a few.
    while (tl.max(moving.to(tl.int32), 0) > 0) & (rounds < 64):
        off = add_scaled(multiply(transpose(x, N, P), x, P, N, P), -1.0, one)
        distance = inner(off, off)
        x = select(moving, add_scaled(x, -0.5, multiply(x, off, N, P, P)), x)
        moving = moving & (distance > ENOUGH)
        rounds += 1
    return x


@triton.jit
def retract_polar(q, xi, step, square, N: tl.constexpr, P: tl.constexpr):
    """``Y (Y^T Y)^{-1/2}``, ``Y = q + step xi``."""
    return polar(add_scaled(q, step, xi), N, P)


@triton.jit
def skew_product(x, q, N: tl.constexpr, P: tl.constexpr):
    """``X Q^T - Q X^T`` (``N x N``)."""
    outer = multiply(x, transpose(q, N, P), N, P, N)
    return scale(symmetric(outer, N, -1), 2.0)


@triton.jit
def retract_cayley(q, xi, step, square, N: tl.constexpr, P: tl.constexpr):
    """``(I - B/2)^{-1} (I + B/2) q``, ``B = P X q^T - q X^T P``, ``P = I - q q^T/2``, ``X = step xi``.

    It only moves q by an orthogonal factor; the polar factor keeps rounding errors of many steps from adding up. For
    square matrices ``X = q A``, which leaves ``q (I - A/2)^{-1} (I + A/2)``.
    """
    x = scale(xi, step)
    if N == P:
        a = symmetric(multiply(transpose(q, N, P), x, P, N, P), P, -1)
        one = identity(q[0], P)
        turned = givens.solve(add_scaled(one, -0.5, a), add_scaled(one, 0.5, a), P, P)
        return polar(multiply(q, turned, N, P, P), N, P)
    px = add_scaled(x, -0.5, multiply(q, multiply(transpose(q, N, P), x, P, N, P), N, P, P))
    b = skew_product(px, q, N, P)
    one = identity(q[0], N)
    right = add_scaled(q, 0.5, multiply(b, q, N, N, P))
    return polar(givens.solve(add_scaled(one, -0.5, b), right, N, P), N, P)


@triton.jit
def retract_exp(q, xi, step, square, N: tl.constexpr, P: tl.constexpr):
    """``[q X] expm([[A, -X^T X], [I, A]]) [I; 0] expm(-A)``, ``A = q^T X``, ``X = step xi`` (Edelman et al. 1998).

    Only the exponentials' products with the identity are formed, ``[u; v/sigma]`` and f, in steps of norm <= 1/2 by
    Taylor polynomials, ``sigma = ||X||_F`` balancing the blocks. The remainder after degree d is below
    (1/2)^{d+1}/(d+1)!, under rounding for d = 8 and 14. Lanes take as many steps as they need. For square
    matrices ``X = q A``, and the same geodesic is ``q expm(A)``.
    """
    DEGREE: tl.constexpr = 14 if q[0].dtype == tl.float64 else 8
    # Projected once more: what is symmetric in A, rounding above all, would grow with the exponential.
    x, _ = project(q, xi, N, P)
    x = scale(x, step)
    a = symmetric(multiply(transpose(q, N, P), x, P, N, P), P, -1)
    sigma = tl.maximum(root(inner(x, x)), 1e-20)
    inverse = divide(tl.full(sigma.shape, 1.0, sigma.dtype), sigma)
    s = scale(multiply(transpose(x, N, P), x, P, N, P), inverse)
    turns = tl.ceil(2.0 * (root(inner(a, a)) + sigma))
    part = divide(tl.full(sigma.shape, 1.0, sigma.dtype), tl.maximum(turns, 1.0))
    u = identity(q[0], P)
    v = scale(u, 0.0)
    f = u
    done = sigma * 0.0
    while tl.max(turns - done, 0) > 0.0:
        du, dv, df = u, v, f
        new_u, new_v, new_f = u, v, f
        for k in range(1, DEGREE + 1):
            share = divide(part, part * 0.0 + k)
            au = multiply(a, du, P, P, P)
            du, dv = (
                scale(add_scaled(au, -1.0, multiply(s, dv, P, P, P)), share),
                scale(add_scaled(multiply(a, dv, P, P, P), sigma, du), share),
            )
            df = scale(multiply(a, df, P, P, P), share if N == P else -share)
            new_u = add_scaled(new_u, 1.0, du)
            new_v = add_scaled(new_v, 1.0, dv)
            new_f = add_scaled(new_f, 1.0, df)
        still = done < turns
        u, v, f = select(still, new_u, u), select(still, new_v, v), select(still, new_f, f)
        done += 1.0
    if N == P:
        return polar(multiply(q, f, N, P, P), N, P)
    y = add_scaled(multiply(q, u, N, P, P), inverse, multiply(x, v, N, P, P))
    return polar(multiply(y, f, N, P, P), N, P)
