"""Stiefel matrices too large for one program: the same step by torch's linear algebra, which is good at them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from manifold_kernels import views
from manifold_kernels.triton.planning import LONGEST_MATRIX, LONGEST_TURN, Member


def _skew(a: Tensor) -> Tensor:
    return (a - a.mT) / 2


def _square(x: Tensor) -> Tensor:
    return (x * x).sum((-2, -1), keepdim=True)


def _project(q: Tensor, d: Tensor) -> Tensor:
    """``d - q sym(q^T d)`` ([FG] Table VII, corrected)."""
    a = q.mT @ d
    return d - q @ ((a + a.mT) / 2)


def _polar(y: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(y, full_matrices=False)
    out: Tensor = u @ vt
    return out


def _retract(name: str, q: Tensor, x: Tensor) -> Tensor:
    """``R_q(x)``, as :mod:`~manifold_kernels.triton.matrices` has it."""
    if name == "qr":
        basis: Tensor
        basis, r = torch.linalg.qr(q + x)
        sign = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1, 1).to(q.dtype)
        return basis * sign.unsqueeze(-2)
    if name == "polar":
        return _polar(q + x)
    square = q.shape[-2] == q.shape[-1]
    turn = _skew(q.mT @ x)
    unit = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    if name == "cayley" and square:
        return _polar(q @ torch.linalg.solve_ex(unit - turn / 2, unit + turn / 2).result)
    if name == "cayley":
        px = x - q @ (q.mT @ x) / 2
        u, z = torch.cat((px, q), -1), torch.cat((q, -px), -1)
        one = torch.eye(u.shape[-1], dtype=q.dtype, device=q.device)
        return _polar(q + u @ torch.linalg.solve_ex(one - z.mT @ u / 2, z.mT @ q).result)
    x = _project(q, x)
    a = _skew(q.mT @ x)
    if square:
        return _polar(q @ torch.linalg.matrix_exp(a))
    block = torch.cat((torch.cat((a, -x.mT @ x), -1), torch.cat((unit.expand_as(a), a), -1)), -2)
    left = torch.linalg.matrix_exp(block)[..., : a.shape[-1]]
    return _polar(torch.cat((q, x), -1) @ left @ torch.linalg.matrix_exp(-a))


def step(
    of: Member,
    h: Mapping[str, Tensor],
    members: Tensor,
    scale: Tensor,
    retraction: str,
    first: Tensor,
    nonfinite: Tensor,
    norms: Tensor | None,
) -> None:
    """Step the components ``members`` of one group ([FG] Algorithm 1); R goes to ``norms``.

    ``h``, a row of ``tables.HYPER_COLUMNS``, and ``first``, whether the step is the parameter's first, lie on the
    device.
    """
    layout = of.layout()
    w, g = (views.matrices(tensor, layout)[members].to(of.compute) for tensor in (of.weight, of.grad))
    wide = w.shape[-2] < w.shape[-1]
    if of.divided:
        g = g / h["divisor"].to(of.compute)
    m = old = None
    d, top = g, g.abs().amax((-2, -1), keepdim=True)
    ok = (w.isfinite() & g.isfinite()).all(-1).all(-1)
    if of.buffered:
        old = views.matrices(of.momentum, layout)[members]
        m = torch.where(first, g, old.to(g.dtype) * h["momentum"] + g * (1 - h["dampening"]))
        m = m.to(of.weight.dtype)
        d = m.to(g.dtype)
        ok = ok & d.isfinite().all(-1).all(-1)
        top = torch.maximum(top, d.abs().amax((-2, -1), keepdim=True))
    steps = h["found_inf"] == 0
    ok, broken = ok & steps, ~ok & steps
    here = ok.reshape(-1, 1, 1)
    c = torch.exp2(torch.floor(torch.log2(torch.where(here & (top > 0), top, 1).double()))).clamp(1e-30, 1e30)
    d = (g / c + d / c * h["momentum"]) if of.nesterov else d / c
    s = scale.to(w.device).reshape(-1, 1, 1)
    q = torch.where(here, w.double() / s, 0).to(of.compute)
    d = torch.where(here, d, 0).to(of.compute)
    q, d = (q.mT, d.mT) if wide else (q, d)
    xi = _project(q, d)
    length = _square(xi).sqrt().double()
    r = c * length if of.individual else (c * length).square().sum().sqrt().expand_as(c)
    if norms is not None:
        norms.copy_(torch.where(ok, r.flatten(), math.nan) if of.individual else r.flatten()[:1])
        norms.masked_fill_(~steps, math.nan)
    tau = torch.ones_like(r)
    if of.bounded:
        bounded = r.clamp(max=1e150)
        curved = (1 + h["curvature"] * (h["rho"] + bounded)).sqrt()
        tau = (bounded * torch.maximum(2 * h["rho"] + bounded, curved)).clamp(min=1)
    longest = LONGEST_TURN if retraction in ("cayley", "exp") else LONGEST_MATRIX[of.compute]
    along = torch.minimum(h["lr"] / tau * c / s, longest / length.clamp(min=1e-20))
    # What does not move is any orthonormal matrix meanwhile, so that no decomposition meets NaN.
    y = _retract(
        retraction,
        torch.where(here, q, torch.eye(*q.shape[-2:], dtype=q.dtype, device=q.device)),
        -along.to(q.dtype) * xi,
    )
    y = y.mT if wide else y
    batch = views.matrices(of.weight, layout).clone()
    batch[members] = torch.where(here, (y * s).to(of.weight.dtype), batch[members])
    views.write_matrices(of.weight, layout, batch)
    if m is not None and old is not None:
        batch = views.matrices(of.momentum, layout).clone()
        batch[members] = torch.where(here, m, old)
        views.write_matrices(of.momentum, layout, batch)
    nonfinite[of.at["parameter"]] += broken.sum().to(nonfinite.device)
