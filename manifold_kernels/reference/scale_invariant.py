"""The PSI quotient: nonzero ``w`` up to positive factors, with the metric ``<xi, zeta>/||w||^2`` ([PSI] Prop. 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_kernels.reference import sphere
from manifold_kernels.reference.euclidean import add
from manifold_kernels.reference.geometry import MATRIX, Geometry, Radius, Retraction, frobenius


def proj(w: Tensor, g: Tensor, s: Radius) -> Tensor:
    """``g - w <w, g>/||w||^2``: the horizontal space is orthogonal to ``w``, along which nothing changes."""
    return sphere.proj(sphere.unit(w), g, 1.0)


def projx(w: Tensor, s: Radius) -> Tensor:
    """``w``, and the first basis vector where it is zero."""
    return torch.where(w.abs().amax(MATRIX, keepdim=True) == 0, sphere.projx(w, 1.0), w)


def egrad2rgrad(w: Tensor, g: Tensor, s: Radius) -> Tensor:
    """``||w||^2 g``: no projection, since ``<w, g> = 0`` for a scale-invariant loss ([PSI] Lemma 1)."""
    return w.square().sum(MATRIX, keepdim=True) * g


def inner(w: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return frobenius(w, u, v) / w.square().sum(MATRIX)


def dist(x: Tensor, y: Tensor, s: Radius) -> Tensor:
    """The angle: the quotient is the unit sphere."""
    return sphere.dist(x, y, 1.0)


GEOMETRY = Geometry(proj, projx, egrad2rgrad, {"add": Retraction(add)}, inner=inner, dist=dist)
