"""Every column has norm ``s``: one sphere per column."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from manifold_kernels.reference import sphere
from manifold_kernels.reference.geometry import MATRIX, Geometry, Radius, Retraction, norm

COLUMN = (-2,)

proj = partial(sphere.proj, dims=COLUMN)
projx = partial(sphere.projx, dims=COLUMN)
projection = partial(sphere.projection, dims=COLUMN)
expmap = partial(sphere.expmap, dims=COLUMN)


def dist(x: Tensor, y: Tensor, s: Radius) -> Tensor:
    """The distance in a product of spheres: the root of the sum of the columns' squared distances."""
    return norm(s * sphere.angle(x, y, COLUMN)).squeeze(MATRIX)


def violation(w: Tensor, s: Radius) -> Tensor:
    """The largest ``|  ||w_j||/s - 1 |`` of the columns."""
    return (norm(w, COLUMN) / s - 1).abs().amax(MATRIX)


GEOMETRY = Geometry(
    proj,
    projx,
    proj,
    {"projection": Retraction(projection), "exp": Retraction(expmap)},
    violation=violation,
    expmap=expmap,
    dist=dist,
)
