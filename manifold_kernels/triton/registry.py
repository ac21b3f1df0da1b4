"""The manifolds that the Triton backend knows: to add one, write its file and its line here."""

from __future__ import annotations

from typing import Any

from manifold_kernels.manifolds import Euclidean, Oblique, Sphere, Stiefel
from manifold_kernels.triton import euclidean, matrices, oblique, sphere, stiefel

#: Projection and retraction on tuples of lanes, by manifold and retraction.
LANE_MANIFOLDS: dict[tuple[int, str], tuple[Any, Any]] = {
    (Euclidean.code, "add"): (euclidean.project, euclidean.retract_add),
    (Sphere.code, "projection"): (sphere.project, sphere.retract_projection),
    (Sphere.code, "exp"): (sphere.project, sphere.retract_exp),
    (Oblique.code, "projection"): (oblique.project, oblique.retract_projection),
    (Oblique.code, "exp"): (oblique.project, oblique.retract_exp),
    (Stiefel.code, "qr"): (stiefel.project, stiefel.retract_qr),
    (Stiefel.code, "polar"): (stiefel.project, stiefel.retract_polar),
    (Stiefel.code, "cayley"): (stiefel.project, stiefel.retract_cayley),
    (Stiefel.code, "exp"): (stiefel.project, stiefel.retract_exp),
}

#: Arcs of vectors; a single column on Stiefel is a sphere.
ARCS: dict[str, Any] = {
    "add": sphere.projection,
    "projection": sphere.projection,
    "exp": sphere.exp,
    "cayley": sphere.cayley,
}

#: Retractions of larger Stiefel matrices, one to a program.
MATRIX_RETRACTIONS: dict[str, Any] = {
    "qr": matrices.retract_qr,
    "polar": matrices.retract_polar,
    "cayley": matrices.retract_cayley,
    "exp": matrices.retract_exp,
}
