"""The manifolds that the reference knows: to add one, write its file and its line here."""

from __future__ import annotations

from manifold_kernels import manifolds
from manifold_kernels.reference import euclidean, grassmann, oblique, scale_invariant, sphere, stiefel
from manifold_kernels.reference.geometry import Geometry

GEOMETRIES: dict[int, Geometry] = {
    manifolds.Euclidean.code: euclidean.GEOMETRY,
    manifolds.Sphere.code: sphere.GEOMETRY,
    manifolds.Oblique.code: oblique.GEOMETRY,
    manifolds.Stiefel.code: stiefel.GEOMETRY,
    manifolds.ScaleInvariant.code: scale_invariant.GEOMETRY,
    manifolds.Grassmann.code: grassmann.GEOMETRY,
}
