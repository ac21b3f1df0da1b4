"""G(1, n): unit vectors up to sign, the unit sphere's formulas but for the distance."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_kernels.reference import sphere
from manifold_kernels.reference.geometry import MATRIX, Geometry, Radius, Retraction


def dist(x: Tensor, y: Tensor, s: Radius) -> Tensor:
    """The angle between two lines, in [0, pi/2]."""
    return torch.minimum(sphere.angle(x, y), sphere.angle(x, -y)).squeeze(MATRIX)


GEOMETRY = Geometry(
    sphere.proj,
    sphere.projx,
    sphere.proj,
    {"exp": Retraction(sphere.expmap)},
    violation=sphere.violation,
    expmap=sphere.expmap,
    dist=dist,
)
