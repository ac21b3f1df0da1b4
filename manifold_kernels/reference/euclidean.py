"""All of R^{n x p}."""

from __future__ import annotations

from torch import Tensor

from manifold_kernels.reference.geometry import MATRIX, Geometry, Radius, Retraction, norm


def proj(w: Tensor, g: Tensor, s: Radius) -> Tensor:
    return g


def projx(w: Tensor, s: Radius) -> Tensor:
    return w


def add(w: Tensor, v: Tensor, s: Radius) -> Tensor:
    return w + v


def dist(x: Tensor, y: Tensor, s: Radius) -> Tensor:
    return norm(x - y).squeeze(MATRIX)


GEOMETRY = Geometry(proj, projx, proj, {"add": Retraction(add)}, expmap=add, dist=dist)
