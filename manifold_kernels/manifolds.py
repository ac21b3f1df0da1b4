"""Manifolds as small immutable descriptions. The mathematics lives in the backends.

A description names a set of points and its scale; how a step returns to the set (the retraction) is an
option of the optimizer's parameter group. Formulas and sources stand in each class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

Scale = float | Literal["unit", "fan"]


@dataclass(frozen=True)
class Manifold:
    """A set of matrices that a weight is kept on. Use one of the subclasses.

    Attributes:
        name: the name used in tables, messages and state dicts.
        code: the number that plans and kernels know the manifold by.
        retractions: the accepted names of retractions, the default first.
    """

    name: ClassVar[str]
    code: ClassVar[int]
    retractions: ClassVar[tuple[str, ...]]

    def __str__(self) -> str:
        return self.name


def _check_scale(scale: object) -> None:
    if scale in ("unit", "fan"):
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(
            f"scale: wanted a finite number > 0, 'unit' or 'fan', got {scale!r}. "
            "'unit' is scale 1; 'fan' keeps the filter norm of He initialisation."
        )


@dataclass(frozen=True)
class _Scaled(Manifold):
    scale: Scale = "unit"

    def __post_init__(self) -> None:
        _check_scale(self.scale)


@dataclass(frozen=True)
class Euclidean(Manifold):
    """All of R^{n x p}: the step is that of ``torch.optim.SGD``.

    >>> Euclidean().name
    'euclidean'
    """

    name = "euclidean"
    code = 0
    retractions = ("add",)


@dataclass(frozen=True)
class Sphere(_Scaled):
    """Matrices with ``||W||_F = s``; ``P_W(G) = G - W <W, G>/s^2`` ([FG] Table VII, on the vectorised weight).

    Args:
        scale: the radius ``s``: a number > 0, ``"unit"`` (1) or ``"fan"`` (the filter norm of He initialisation).

    >>> Sphere(scale=2.0)
    Sphere(scale=2.0)
    """

    name = "sphere"
    code = 1
    retractions = ("projection", "exp")


@dataclass(frozen=True)
class Oblique(_Scaled):
    """Matrices whose columns all have norm ``s``; every column is projected and retracted as on the sphere.

    Args:
        scale: the columns' norm ``s``, as in :class:`Sphere`.
    """

    name = "oblique"
    code = 2
    retractions = ("projection", "exp")


@dataclass(frozen=True)
class Stiefel(_Scaled):
    """``W^T W = s^2 I`` (orthonormal columns; rows where n < p); ``P_W(G) = G - W sym(W^T G)/s^2``.

    Args:
        scale: ``s``, the value of every singular value, as in :class:`Sphere`.
    """

    name = "stiefel"
    code = 3
    retractions = ("qr", "polar", "cayley", "exp")


@dataclass(frozen=True)
class ScaleInvariant(Manifold):
    """The PSI quotient ``w ~ a w, a > 0`` of nonzero vectors, metric ``<xi, zeta>/||w||^2`` ([PSI] Prop. 1, Eq. 9-11).

    The Riemannian gradient is ``||w||^2 g``; the retraction is ``w + v``.
    """

    name = "scale_invariant"
    code = 4
    retractions = ("add",)


@dataclass(frozen=True)
class Grassmann(Manifold):
    """G(1, n): unit vectors up to sign, the manifold of SGD-G and Adam-G (Cho & Lee 2017)."""

    name = "grassmann"
    code = 5
    retractions = ("exp",)


MANIFOLDS: tuple[type[Manifold], ...] = (Euclidean, Sphere, Oblique, Stiefel, ScaleInvariant, Grassmann)
BY_NAME: dict[str, type[Manifold]] = {manifold.name: manifold for manifold in MANIFOLDS}

#: Numbers of the retractions in plans and kernels.
RETRACTIONS: dict[str, int] = {"add": 0, "projection": 1, "qr": 2, "polar": 3, "cayley": 4, "exp": 5}


def manifold(spec: Manifold | str | None) -> Manifold:
    """The manifold that ``spec`` means: itself, one by name with its default scale, or Euclidean for ``None``.

    >>> manifold("stiefel")
    Stiefel(scale='unit')
    """
    if spec is None:
        return Euclidean()
    if isinstance(spec, Manifold):
        return spec
    if isinstance(spec, str) and spec in BY_NAME:
        return BY_NAME[spec]()
    raise ValueError(f"manifold: wanted a Manifold, None or one of {sorted(BY_NAME)}, got {spec!r}.")


def retraction_code(of: Manifold, name: str | None) -> int:
    """The number of the retraction ``name`` on the manifold ``of`` (``None``: the manifold's default)."""
    if name is None:
        return RETRACTIONS[of.retractions[0]]
    if name not in of.retractions:
        raise ValueError(f"retraction: wanted one of {list(of.retractions)} for {of.name}, got {name!r}.")
    return RETRACTIONS[name]
