"""The ways through the kernels, a weight for each, and how far off its manifold rounding may leave it."""

from __future__ import annotations

import torch
from cpu_lockstep import FG, VECTOR_RULES, arithmetic, on_manifold
from stepping import group
from torch import Tensor

from manifold_kernels import plan, views
from manifold_kernels.manifolds import BY_NAME
from manifold_kernels.reference.registry import GEOMETRIES
from manifold_kernels.views import Layout

KERNEL, FILTER, MATRIX = Layout("kernel"), Layout("filter"), Layout("matrix")

#: One weight for each way through the kernels: registers of matrices of a fixed and of any size, long vectors, larger
#: matrices, torch's linear algebra, in groups that fit in a cache and in one that does not.
ENGINES: list[tuple[str, str, tuple[int, ...], Layout]] = [
    *((of, option, (4, 9, 3, 3), KERNEL) for of, option in FG),
    *((of, option, (4, 9, 2, 3), KERNEL) for of, option in FG if of == "stiefel"),
    *(
        (of, option, (6, 30, 3, 3), FILTER)
        for of, option in [("sphere", "projection"), ("sphere", "exp"), *VECTOR_RULES]
    ),
    ("oblique", "projection", (2, 9, 40, 10), KERNEL),
    ("oblique", "exp", (2, 9, 40, 10), KERNEL),
    *((of, option, (2, 3, 18, 17), KERNEL) for of, option in FG if of == "stiefel"),
    ("stiefel", "qr", (1, 3, 64, 20), KERNEL),
    ("stiefel", "qr", (3, 16, 17, 33), KERNEL),
    ("sphere", "projection", (64, 60, 3, 3), KERNEL),
    ("stiefel", "qr", (64, 60, 3, 3), KERNEL),
    ("oblique", "projection", (64, 60, 3, 3), KERNEL),
    ("sphere", "exp", (40, 1000), FILTER),
]


def weight_of(of: str, shape: tuple[int, ...], layout: Layout, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(shape, dtype=torch.float64)
    return on_manifold(BY_NAME[of](), weight, layout, torch.ones(views.shape_of(weight, layout).count)).to(dtype)


def row(of: str, option: str, layout: Layout, **rest: object) -> plan.Group:
    if (of, option) in FG:
        return group(of, layout, retraction=option, **rest)
    return group(of, layout, rule=option)


def read(tensor: Tensor, layout: Layout) -> Tensor:
    return views.matrices(tensor, layout)


def violation(of: str, weight: Tensor, layout: Layout) -> float:
    """In float64; the scale is 1."""
    return float(GEOMETRIES[BY_NAME[of].code].violation(read(weight, layout).double(), 1.0).max())


def landing(of: str, layout: Layout, weight: Tensor) -> float:
    """How far off the manifold rounding may leave a point.

    Rounding the elements to their type (eps/2 each, relative) changes norms by eps/2 and elements of a Gram matrix by
    eps. Roundings of the arithmetic, eps/2 each: a norm is the root of a sum in double or of at most 64 terms; an
    element of an orthonormal matrix has passed n + p rotations, or products of as many terms, and the Gram matrix
    doubles what is left of them.
    """
    shape = views.shape_of(weight, layout)
    terms = shape.n + shape.p if of == "stiefel" else 8
    return torch.finfo(weight.dtype).eps + (3 + terms) * arithmetic(weight.dtype)
