"""Update rules: what turns the gradients of a group's components into their next weights and states.

The ambient momentum of [FG] Eq. 31 is computed in the optimizer's arithmetic (float32 for 16 and 32-bit storage), so
that it agrees with ``torch.optim.SGD`` bit for bit. Everything behind it is computed in float64 and rounded once:
this is the yardstick for other backends. Gradients are divided by a power of two first, so that no square overflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_kernels import plan
from manifold_kernels.reference import sphere
from manifold_kernels.reference.geometry import MATRIX, Geometry, Retraction, norm, power_of_two


class Hyper(NamedTuple):
    """One row of the table of hyper-parameters, in the order of ``plan.HYPER_COLUMNS``."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: float
    maximize: float
    rho: float
    curvature: float
    guard: float
    clip: float
    beta2: float
    eps: float


@dataclass(frozen=True)
class Components:
    """Components of one group and how they move.

    Attributes:
        w: weights ``(k, n, p)``.
        g: finite gradients ``(k, n, p)`` (any, in Euclidean groups), divided by AMP's scale where there is one.
        m: momentum buffers ``(k, n, p)``, or ``None`` without momentum.
        v: Adam-G's second moments ``(k, 1, 1)``, or ``None``.
        s: scales ``(k, 1, 1)``, float64.
        steps: how many steps the parameter has taken; at 0 the buffers are not read.
        individual: every component has its own norm and step size.
        bounded: the step size is bounded by [FG] Eq. 5.
    """

    w: Tensor
    g: Tensor
    m: Tensor | None
    v: Tensor | None
    s: Tensor
    steps: int
    geometry: Geometry
    retraction: Retraction
    individual: bool
    bounded: bool

    def gradient(self, h: Hyper, dtype: torch.dtype) -> Tensor:
        """The gradient of what is minimised, as ``dtype``."""
        g = self.g.to(dtype)
        return -g if h.maximize else g


class Moved(NamedTuple):
    """The next weights, and states where there are any, in their storage types; ``r (k, 1, 1)`` is R of FG-SGD."""

    w: Tensor
    m: Tensor | None = None
    v: Tensor | None = None
    r: Tensor | None = None


Rule = Callable[[Components, Hyper], Moved]


def all_finite(x: Tensor) -> Tensor:
    """Which matrices of ``x (k, n, p)`` are finite, ``(k, 1, 1)``."""
    return x.isfinite().flatten(1).all(1).reshape(-1, 1, 1)


def _buffer(g: Tensor, x: Components, h: Hyper) -> Tensor | None:
    """[FG] Eq. 31, ``M <- theta_mu M + theta_E G``, and ``M = G`` at the first step, rounded to its storage type."""
    if x.m is None:
        return None
    m = g if x.steps == 0 else x.m.to(g.dtype).mul(h.momentum).add(g, alpha=1 - h.dampening)
    return m.to(x.m.dtype)


def _direction(g: Tensor, m: Tensor | None, h: Hyper) -> Tensor:
    if m is None:
        return g
    return g.add(m, alpha=h.momentum) if h.nesterov else m


def _sgd_direction(x: Components, h: Hyper) -> tuple[Tensor, Tensor | None]:
    """What ``torch.optim.SGD(foreach=False, fused=False)`` steps along, and its buffer, operation by operation."""
    dtype = _arithmetic(x.w)
    g = x.gradient(h, dtype)
    if h.weight_decay:
        g = g.add(x.w.to(dtype), alpha=h.weight_decay)
    m = _buffer(g, x, h)
    return _direction(g, None if m is None else m.to(dtype), h), m


def euclidean_sgd(x: Components, h: Hyper) -> Moved:
    """The step of ``torch.optim.SGD(foreach=False, fused=False)``."""
    d, m = _sgd_direction(x, h)
    moved = x.w.to(d.dtype).add(d, alpha=-h.lr).to(x.w.dtype)
    return Moved(moved, m, r=_group_norm(torch.ones_like(x.s), norm(d.double()), x))


def euclidean_fg_sgd(x: Components, h: Hyper) -> Moved:
    """[FG] Algorithm 1 on the Euclidean space: along torch's direction d, with R = ||d||, ``W <- W - (lr/tau) d``."""
    d, m = _sgd_direction(x, h)
    # A component that is not finite will not move; it must not enter the norm of the others.
    r = _group_norm(torch.ones_like(x.s), norm(torch.where(all_finite(d), d.double(), 0)), x)
    return Moved((x.w.double() - h.lr / _tau(r, x, h) * d.double()).to(x.w.dtype), m, r=r)


def _arithmetic(w: Tensor) -> torch.dtype:
    return torch.promote_types(w.dtype, torch.float32)


def fg_sgd(x: Components, h: Hyper) -> Moved:
    """[FG] Algorithm 1: momentum, ``xi = P_W(d)``, Theorem 1, Eq. 5, retraction."""
    m = _buffer(x.gradient(h, _arithmetic(x.w)), x, h)
    w, g = x.w.double(), x.gradient(h, torch.float64)
    c = power_of_two(g)
    wide_m = None
    if m is not None:
        # A component whose momentum has become infinite will not move; it must not enter the norm of the others.
        finite = all_finite(m)
        g, wide_m = torch.where(finite, g, 0), torch.where(finite, m.double(), 0)
        c = torch.maximum(power_of_two(g), power_of_two(wide_m))
    d = _direction(g / c, None if wide_m is None else wide_m / c, h)
    xi = x.geometry.egrad2rgrad(w, d, x.s)
    length = norm(xi)
    r = _group_norm(c, length, x)
    # V = -(lr/tau) c xi, no longer than the retraction can take.
    factor = torch.minimum(h.lr / _tau(r, x, h) * c, x.retraction.longest * x.s / length)
    return Moved(x.retraction.retract(w, -factor * xi, x.s).to(x.w.dtype), m, r=r)


def _group_norm(c: Tensor, length: Tensor, x: Components) -> Tensor:
    """R of [FG] Theorem 1 for components with ``||xi|| = c length``, one number for each."""
    if x.individual:
        return c * length
    top = c.max()
    whole: Tensor = top * torch.linalg.vector_norm(c / top * length)
    return whole.expand_as(c)


def _tau(r: Tensor, x: Components, h: Hyper) -> Tensor:
    """``tau`` of [FG] Eq. 5, 1 without a bound."""
    return step_size_factor(r, h.rho, h.curvature) if x.bounded else torch.ones_like(r)


def step_size_factor(r: Tensor, rho: Tensor | float, curvature: Tensor | float) -> Tensor:
    """``tau`` of [FG] Eq. 5 for groups of norm R; Corollary 2 is rho = 1, c = 0."""
    r = r.clamp(max=1e300)  # tau is infinite anyway, but curvature * r must not be 0 * inf
    return (r * torch.maximum(2 * rho + r, (1 + curvature * (rho + r)).sqrt())).clamp(min=1)


def psi_sgd(x: Components, h: Hyper) -> Moved:
    """[PSI] Eq. 11: ``u <- rho u - lr ||w||^2 g``, ``w <- (1 - k) w + u``, and the guard of section 6.2."""
    w, g = x.w.double(), x.gradient(h, torch.float64)
    u = -h.lr * x.geometry.egrad2rgrad(w, g, x.s)
    if x.m is not None:
        if x.steps > 0:
            u = u + h.momentum * x.m.double()
        u = u.to(x.m.dtype).double()
    decay = (h.lr * h.weight_decay * w.square().sum(MATRIX, keepdim=True)).clamp(max=0.5)
    w = x.retraction.retract((1 - decay) * w, u, x.s)
    length = norm(w)
    divisor = torch.where(length > h.guard, length, 1)
    return Moved((w / divisor).to(x.w.dtype), None if x.m is None else (u / divisor).to(x.m.dtype))


def _clipped(w: Tensor, x: Components, h: Hyper) -> Tensor:
    """``h min(1, nu/||h||)`` with the Riemannian gradient ``h`` on G(1, n)."""
    g = x.gradient(h, torch.float64)
    c = power_of_two(g)
    rgrad = x.geometry.egrad2rgrad(w, g / c, 1.0)
    return rgrad * torch.minimum(c, h.clip / norm(rgrad))


def _transported(x: Components, w: Tensor, tau: Tensor) -> Tensor | None:
    """``tau`` without its component along the new ``w``, which rounding would let grow, in its storage type."""
    return None if x.m is None else x.geometry.proj(w, tau, 1.0).to(x.m.dtype)


def sgd_g(x: Components, h: Hyper) -> Moved:
    """SGD-G (Cho & Lee 2017): ``d = rho tau - lr h``, a geodesic step along d, and d transported with it."""
    w = sphere.unit(x.w.double())
    d = -h.lr * _clipped(w, x, h)
    if x.m is not None and x.steps > 0:
        d = d + h.momentum * x.m.double()
    angle = norm(d)
    moved = x.retraction.retract(w, d, 1.0)
    tau = d * angle.cos() - w * angle * angle.sin()
    return Moved(moved.to(x.w.dtype), _transported(x, moved, tau))


def adam_g(x: Components, h: Hyper) -> Moved:
    """Adam-G (Cho & Lee 2017): one second moment per vector, and the first moment transported along the step."""
    assert x.m is not None and x.v is not None
    w = sphere.unit(x.w.double())
    rgrad = _clipped(w, x, h)
    m = (1 - h.momentum) * rgrad
    v = (1 - h.beta2) * rgrad.square().sum(MATRIX, keepdim=True)
    if x.steps > 0:
        m = m + h.momentum * x.m.double()
        v = v + h.beta2 * x.v.double()
    v = v.to(x.v.dtype)
    t = x.steps + 1
    rate = h.lr * math.sqrt(1 - h.beta2**t) / (1 - h.momentum**t)
    d = -rate * m / (v.double() + h.eps).sqrt()
    angle, u = norm(d), sphere.unit(d)
    moved = x.retraction.retract(w, d, 1.0)
    tau = m - (u * m).sum(MATRIX, keepdim=True) * (w * angle.sin() + (1 - angle.cos()) * u)
    return Moved(moved.to(x.w.dtype), _transported(x, moved, tau), v)


#: By the numbers of ``plan.RULES``.
RULES: dict[int, Rule] = {
    plan.RULES["fg_sgd"]: fg_sgd,
    plan.RULES["psi_sgd"]: psi_sgd,
    plan.RULES["sgd_g"]: sgd_g,
    plan.RULES["adam_g"]: adam_g,
}
