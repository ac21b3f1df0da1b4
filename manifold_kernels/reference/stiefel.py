"""``W^T W = s^2 I``; ``W W^T = s^2 I`` where n < p, by the same formulas on the transposed matrices."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from manifold_kernels.reference.geometry import MATRIX, Geometry, Radius, Retraction

# cayley and exp of a step beyond this many s: what is left is a rotation by many turns, whose angle rounding has
# lost, while the matrices that they invert or exponentiate become singular or overflow.
LONGEST = 64.0


def _tall(function: Callable[[Tensor, Tensor, Radius], Tensor]) -> Callable[[Tensor, Tensor, Radius], Tensor]:
    @wraps(function)
    def either_way(w: Tensor, x: Tensor, s: Radius) -> Tensor:
        if w.shape[-2] < w.shape[-1]:
            return function(w.mT, x.mT, s).mT
        return function(w, x, s)

    return either_way


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


@_tall
def proj(w: Tensor, g: Tensor, s: Radius) -> Tensor:
    """``G - W sym(W^T G)/s^2`` ([FG] Table VII, corrected)."""
    q = w / s
    a = q.mT @ g
    return g - q @ (a + a.mT) / 2


def positive_qr(a: Tensor) -> tuple[Tensor, Tensor]:
    """The thin QR decomposition with ``diag(R) >= 0``, unique where the rank is full."""
    q, r = torch.linalg.qr(a)
    sign = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1, 1).to(a.dtype)
    return q * sign.unsqueeze(-2), r * sign.unsqueeze(-1)


class _Polar(torch.autograd.Function):
    """``U V^T`` of the singular value decomposition ``X = U S V^T``.

    Automatic differentiation of the decomposition divides by differences of singular values, which are all equal
    on the manifold; the polar factor ``Q`` itself is smooth. With ``H = V S V^T`` its differential is
    ``Q O + (I - Q Q^T) dX H^-1``, where the skew ``O`` solves ``H O + O H = Q^T dX - dX^T Q``: only sums appear.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        u, sigma, vt = torch.linalg.svd(x, full_matrices=False)
        q: Tensor = u @ vt
        ctx.save_for_backward(q, sigma, vt)
        return q

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        q, sigma, vt = ctx.saved_tensors
        a = q.mT @ grad
        sums = sigma.unsqueeze(-1) + sigma.unsqueeze(-2)
        skew = vt.mT @ ((vt @ (a - a.mT) @ vt.mT) / sums) @ vt
        normal = ((grad - q @ a) @ vt.mT / sigma.unsqueeze(-2)) @ vt
        total: Tensor = q @ skew + normal
        return total


def polar(x: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (rows where n < p): ``X (X^T X)^{-1/2}``."""
    if x.shape[-2] < x.shape[-1]:
        return polar(x.mT).mT
    q: Tensor = _Polar.apply(x)  # type: ignore[no-untyped-call]
    return q


def _solve(a: Tensor, b: Tensor) -> Tensor:
    """``A^-1 B`` without a look at whether A is singular, for which the host would wait for a GPU."""
    x: Tensor = torch.linalg.solve_ex(a, b)[0]
    return x


def _newton_schulz(q: Tensor) -> Tensor:
    """One step towards the nearest orthonormal matrix, so that rounding errors do not add up from step to step."""
    return q @ (3 * _eye(q) - q.mT @ q) / 2


def projx(w: Tensor, s: Radius) -> Tensor:
    return s * polar(w)


@_tall
def retr_qr(w: Tensor, v: Tensor, s: Radius) -> Tensor:
    """``s qf(W + V)``."""
    return s * positive_qr(w + v)[0]


def retr_polar(w: Tensor, v: Tensor, s: Radius) -> Tensor:
    """``s (Q + X) ((Q + X)^T (Q + X))^{-1/2}``, ``Q = W/s``, ``X = V/s``."""
    return s * polar(w + v)


def _turn(q: Tensor, x: Tensor) -> Tensor:
    """The skew part of ``Q^T X``: all of it for a tangent X, but for rounding."""
    a = q.mT @ x
    return (a - a.mT) / 2


@_tall
def retr_cayley(w: Tensor, v: Tensor, s: Radius) -> Tensor:
    """``s (I - B/2)^-1 (I + B/2) Q``, ``B = P X Q^T - Q X^T P``, ``P = I - Q Q^T/2``, by Woodbury's formula.

    For square matrices ``X = Q A`` and ``B = Q A Q^T``, which leaves ``s Q (I - A/2)^-1 (I + A/2)``.
    """
    q, x = w / s, v / s
    if q.shape[-1] == q.shape[-2]:
        a = _turn(q, x)
        return s * _newton_schulz(q @ _solve(_eye(a) - a / 2, _eye(a) + a / 2))
    px = x - q @ (q.mT @ x) / 2
    u = torch.cat((px, q), -1)
    z = torch.cat((q, -px), -1)
    moved = q + u @ _solve(_eye(u) - z.mT @ u / 2, z.mT @ q)
    return s * _newton_schulz(moved)


@_tall
def expmap(w: Tensor, v: Tensor, s: Radius) -> Tensor:
    """``s [Q X] expm([[A, -X^T X], [I, A]]) [I; 0] expm(-A)``, ``A = Q^T X`` (Edelman et al. 1998, Eq. 2.7).

    For square matrices ``X = Q A``, and the same geodesic is ``s Q expm(A)``.
    """
    q = w / s
    if q.shape[-1] == q.shape[-2]:
        return s * _newton_schulz(q @ torch.linalg.matrix_exp(_turn(q, v / s)))
    # The formula grows exponentially with the symmetric part of A, which rounding of W to 16 bits makes large.
    x = proj(q, v / s, 1.0)
    a = _turn(q, x)
    one = _eye(a).expand_as(a)
    block = torch.cat((torch.cat((a, -x.mT @ x), -1), torch.cat((one, a), -1)), -2)
    left = torch.linalg.matrix_exp(block)[..., : a.shape[-1]]
    return s * _newton_schulz(torch.cat((q, x), -1) @ left @ torch.linalg.matrix_exp(-a))


def violation(w: Tensor, s: Radius) -> Tensor:
    """The largest element of ``|W^T W/s^2 - I|`` (``W W^T`` where n < p)."""
    q = (w.mT if w.shape[-2] < w.shape[-1] else w) / s
    return (q.mT @ q - _eye(q)).abs().amax(MATRIX)


GEOMETRY = Geometry(
    proj,
    projx,
    proj,
    {
        "qr": Retraction(retr_qr),
        "polar": Retraction(retr_polar),
        "cayley": Retraction(retr_cayley, LONGEST),
        "exp": Retraction(expmap, LONGEST),
    },
    violation=violation,
    expmap=expmap,
)
