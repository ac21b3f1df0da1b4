"""What a manifold must offer: functions on batches ``(..., n, p)`` that the step and the functional API share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

#: The scale ``s``: a number, or a tensor that broadcasts against ``(..., n, p)``.
Radius = Tensor | float

#: The dimensions of one matrix.
MATRIX = (-2, -1)


def frobenius(w: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """``<u, v>``, the embedded metric, the same at every ``w``; ``(..., n, p)`` to ``(...)``."""
    return (u * v).sum(MATRIX)


def nowhere(w: Tensor, s: Radius) -> Tensor:
    """The violation where there is no constraint: zeros ``(...)``."""
    return w.new_zeros(w.shape[:-2])


@dataclass(frozen=True)
class Retraction:
    """``retract(w, v, s)`` and the longest step, in units of ``s``, that an optimizer may hand to it.

    The default only keeps ``v`` finite in float64: of so long a step nothing but the direction is left.
    """

    retract: Callable[[Tensor, Tensor, Radius], Tensor]
    longest: float = 1e280


@dataclass(frozen=True)
class Geometry:
    """The functions of one manifold.

    Attributes:
        proj: ``(w, g, s)``, the orthogonal projection onto the tangent space at ``w``.
        projx: ``(w, s)``, the nearest point of the manifold.
        egrad2rgrad: ``(w, g, s)``, the Riemannian gradient of a function with Euclidean gradient ``g``.
        retractions: by the names in ``Manifold.retractions``.
        violation: ``(w, s)``, how far ``w`` is off the manifold relative to ``s``, one number per matrix.
        inner: ``(w, u, v)``, the metric, one number per matrix.
        expmap: ``(w, v, s)``, the exponential map, where it is known.
        dist: ``(x, y, s)``, the geodesic distance, one number per matrix, where it has a closed form.
    """

    proj: Callable[[Tensor, Tensor, Radius], Tensor]
    projx: Callable[[Tensor, Radius], Tensor]
    egrad2rgrad: Callable[[Tensor, Tensor, Radius], Tensor]
    retractions: Mapping[str, Retraction]
    violation: Callable[[Tensor, Radius], Tensor] = nowhere
    inner: Callable[[Tensor, Tensor, Tensor], Tensor] = frobenius
    expmap: Callable[[Tensor, Tensor, Radius], Tensor] | None = None
    dist: Callable[[Tensor, Tensor, Radius], Tensor] | None = None


def power_of_two(x: Tensor, dims: tuple[int, ...] = MATRIX) -> Tensor:
    """The power of two ``c <= max|x| < 2c`` over ``dims`` (kept), 1 where x is zero.

    Dividing by it is exact and leaves numbers below 2, whose squares cannot overflow. It is a constant to autograd.
    """
    top = x.detach().abs().amax(dims, keepdim=True)
    mantissa = torch.frexp(top).mantissa
    return torch.where(top > 0, top / (2 * mantissa), torch.ones_like(top))


def norm(x: Tensor, dims: tuple[int, ...] = MATRIX) -> Tensor:
    """The Frobenius norm over ``dims`` (kept), without overflow or underflow of the squares."""
    c = power_of_two(x, dims)
    scaled: Tensor = torch.linalg.vector_norm(x / c, dim=dims, keepdim=True)
    return c * scaled
