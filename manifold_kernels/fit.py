"""How a manifold fits a parameter: its default view, its scale in numbers, and whether it would freeze the weight."""

from __future__ import annotations

import math

from torch import Tensor

from manifold_kernels.manifolds import Euclidean, Grassmann, Manifold, Oblique, ScaleInvariant, Stiefel, _Scaled
from manifold_kernels.views import Layout, Shape, canonical, kernel_dims, shape_of


def default_view(of: Manifold, weight: Tensor) -> str:
    """``flat`` for Euclidean, ``matrix`` for linear weights, ``kernel`` where a kernel is a matrix, ``filter`` for the
    others and wherever points are vectors (PSI, Grassmann)."""
    if isinstance(of, Euclidean):
        return "flat"
    if isinstance(of, (ScaleInvariant, Grassmann)):
        return "filter"
    if weight.dim() == 2:
        return "matrix"
    has_kernels = weight.dim() > 3 and kernel_dims(canonical(weight, Layout("filter"))) is not None
    return "kernel" if has_kernels else "filter"


def frozen(of: Manifold, shape: Shape) -> str | None:
    """Why a component of ``shape`` could not move on the manifold (its tangent space is {0}), or ``None``."""
    if isinstance(of, Oblique) and shape.n == 1:
        return "every column has a single element, so that the manifold is {-s, +s}"
    if not isinstance(of, (Euclidean, ScaleInvariant)) and shape.n == 1 and shape.p == 1:
        return "every component has a single element, so that the manifold is {-s, +s}"
    if isinstance(of, Grassmann) and shape.p != 1:
        return "its points are vectors"
    return None


def scale_of(of: Manifold, layout: Layout, weight: Tensor) -> float:
    """The scale ``s`` in numbers.

    ``"fan"`` gives a filter (all weights into one output neuron) the norm sqrt(2) that He initialisation gives it on
    average: sphere ``s = sqrt(2/C)``, oblique and Stiefel ``s = sqrt(2/(C min(n, p)))`` for ``kernel`` views with C
    inputs; ``sqrt(2)`` for ``filter`` views; for ``matrix`` views ``s^2 rank = 2 D``, with rank 1 (sphere), p
    (oblique), min(n, p) (Stiefel) and D outputs.
    """
    if not isinstance(of, _Scaled) or of.scale == "unit":
        return 1.0
    if of.scale != "fan":
        return float(of.scale)
    shape = shape_of(weight, layout)
    # rank = ||W||_F^2 at s = 1; in the kernel view an oblique one counts by min(n, p), as a Stiefel one does.
    rank = 1 if not isinstance(of, (Oblique, Stiefel)) else min(shape.n, shape.p)
    if layout.view == "kernel":
        return math.sqrt(2 / (shape.inputs * rank))
    if isinstance(of, Oblique):
        rank = shape.p
    filters = shape.outputs if layout.view == "matrix" else layout.rows
    return math.sqrt(2 * filters / rank)
