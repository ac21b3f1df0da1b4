"""``||W||_F = s``. The functions take the dimensions that one vector runs over, so that the oblique manifold
(one sphere per column) and the Grassmannian (unit spheres up to sign) are made of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manifold_kernels.reference.geometry import MATRIX, Geometry, Radius, Retraction, norm, power_of_two

Dims = tuple[int, ...]


def proj(w: Tensor, g: Tensor, s: Radius, dims: Dims = MATRIX) -> Tensor:
    """``G - W <W, G>/s^2`` ([FG] Table VII, corrected)."""
    q = w / s
    return g - q * (q * g).sum(dims, keepdim=True)


def unit(y: Tensor, dims: Dims = MATRIX) -> Tensor:
    """``y/||y||``, and ``y`` where it is zero."""
    z = y / power_of_two(y, dims)
    length = torch.linalg.vector_norm(z, dim=dims, keepdim=True)
    return torch.where(length > 0, z / torch.where(length > 0, length, 1), y)


def projx(w: Tensor, s: Radius, dims: Dims = MATRIX) -> Tensor:
    """``s W/||W||``; zero vectors, to which every point is nearest, become ``s`` times the first basis vector."""
    first = torch.zeros_like(w)
    first[(..., 0, 0) if -1 in dims else (..., 0, slice(None))] = 1
    return s * torch.where(w.abs().amax(dims, keepdim=True) == 0, first, unit(w, dims))


def projection(w: Tensor, v: Tensor, s: Radius, dims: Dims = MATRIX) -> Tensor:
    """``s (W + V)/||W + V||``."""
    return s * unit(w + v, dims)


def expmap(w: Tensor, v: Tensor, s: Radius, dims: Dims = MATRIX) -> Tensor:
    """``W cos(||V||/s) + V sinc(||V||/s)``, normalised so that the rounding errors of many steps do not add up."""
    angle = norm(v, dims) / s
    return s * unit(w * torch.cos(angle) + v * torch.sinc(angle / math.pi), dims)


def angle(x: Tensor, y: Tensor, dims: Dims = MATRIX) -> Tensor:
    """The angle between x and y in [0, pi], accurate at both ends (Kahan's formula)."""
    x, y = unit(x, dims), unit(y, dims)
    return 2 * torch.atan2(norm(x - y, dims), norm(x + y, dims))


def dist(x: Tensor, y: Tensor, s: Radius) -> Tensor:
    return (s * angle(x, y)).squeeze(MATRIX)


def violation(w: Tensor, s: Radius) -> Tensor:
    """``|  ||W||/s - 1 |``."""
    return (norm(w) / s - 1).abs().squeeze(MATRIX)


GEOMETRY = Geometry(
    proj,
    projx,
    proj,
    {"projection": Retraction(projection), "exp": Retraction(expmap)},
    violation=violation,
    expmap=expmap,
    dist=dist,
)
