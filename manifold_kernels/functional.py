"""Riemannian geometry of weights as functions on tensors ``(..., n, p)``, differentiable by autograd.

Every function takes a batch of matrices of type float32 or float64, and a
:class:`~manifold_kernels.manifolds.Manifold` (or its name) whose scale is a number or ``"unit"``. Shapes must agree;
wrong ones raise ``ValueError``. The mathematics is the reference backend's, but for :func:`qr`, :func:`qf` and
:func:`polar`, which are operators with kernels of every backend, and what is made of them: :func:`projx`
on Stiefel and its retractions ``qr`` and ``polar``. On a GPU, with the
compiled kernels, nothing here makes the host wait, but for
:func:`expmap` on Stiefel (torch's matrix exponential), derivatives of the polar factor beyond 3 columns (eigenvalues),
and matrices that are too large for the kernels. :func:`project_weight_` and
:func:`weight_violation` work on whole weights of any type.

>>> import torch
>>> from manifold_kernels import functional as F
>>> x = F.projx("stiefel", torch.randn(8, 3, 3))
>>> v = F.proj("stiefel", x, torch.randn(8, 3, 3))
>>> bool(F.violation("stiefel", F.retr("stiefel", x, 0.1 * v)).max() < 1e-5)
True
"""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_kernels import decompositions, fit, manifolds, views
from manifold_kernels.manifolds import Grassmann, Manifold, Stiefel
from manifold_kernels.reference.geometry import Geometry
from manifold_kernels.reference.registry import GEOMETRIES
from manifold_kernels.views import Layout

Spec = Manifold | str


def proj(manifold: Spec, x: Tensor, v: Tensor) -> Tensor:
    """The orthogonal projection ``P_x(v)`` of ambient ``v`` onto the tangent space at ``x``.

    sphere ``v - x <x, v>/s^2``, oblique the same for every column, Stiefel ``v - x sym(x^T v)/s^2`` ([FG] Table VII,
    corrected), Grassmann ``v - x <x, v>``; scale-invariant ``v - x <x, v>/||x||^2`` (the horizontal space). For the
    manifolds with the embedded metric it is also :func:`egrad2rgrad`; on the scale-invariant quotient it is not.

    >>> proj("sphere", torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0], [3.0]])).flatten().tolist()
    [0.0, 3.0]
    """
    geometry, s = _geometry(manifold, x, v=v)
    return geometry.proj(x, v, s)


def projx(manifold: Spec, x: Tensor) -> Tensor:
    """The point of the manifold nearest to ``x``.

    Sphere and Grassmann ``s x/||x||``, oblique the same for every column, Stiefel ``s polar(x)``; scale-invariant
    points stay. Zero vectors and zero columns of an oblique matrix become ``s`` times the first basis vector.

    >>> projx("sphere", torch.tensor([[3.0], [4.0]])).flatten().tolist()
    [0.6000000238418579, 0.800000011920929]
    """
    geometry, s = _geometry(manifold, x)
    return s * polar(x) if geometry is GEOMETRIES[Stiefel.code] else geometry.projx(x, s)


def egrad2rgrad(manifold: Spec, x: Tensor, egrad: Tensor) -> Tensor:
    """The Riemannian gradient at ``x`` of a function with Euclidean gradient ``egrad``.

    :func:`proj` where the metric is the embedded one; scale-invariant: ``||x||^2 egrad`` ([PSI] Prop. 1), which is
    horizontal for scale-invariant functions.

    >>> egrad2rgrad("scale_invariant", torch.tensor([[2.0], [0.0]]), torch.tensor([[0.0], [1.0]])).flatten().tolist()
    [0.0, 4.0]
    """
    geometry, s = _geometry(manifold, x, egrad=egrad)
    return geometry.egrad2rgrad(x, egrad, s)


def inner(manifold: Spec, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The metric ``<u, v>_x``, shape ``(...)``.

    The Frobenius inner product; scale-invariant ``<u, v>/||x||^2`` ([PSI] Prop. 1).

    >>> inner("scale_invariant", torch.tensor([[2.0]]), torch.tensor([[2.0]]), torch.tensor([[6.0]])).item()
    3.0
    """
    geometry, _ = _geometry(manifold, x, u=u, v=v)
    return geometry.inner(x, u, v)


def norm(manifold: Spec, x: Tensor, v: Tensor) -> Tensor:
    """``sqrt(<v, v>_x)``, shape ``(...)``. Not differentiable at ``v = 0``.

    >>> norm("euclidean", torch.zeros(2, 1), torch.tensor([[3.0], [4.0]])).item()
    5.0
    """
    return inner(manifold, x, v, v).sqrt()


def retr(manifold: Spec, x: Tensor, v: Tensor, retraction: str | None = None) -> Tensor:
    """The retraction ``R_x(v)`` of a tangent ``v``.

    Args:
        manifold: where ``x`` lies.
        x: points ``(..., n, p)``.
        v: tangent vectors of the same shape.
        retraction: a name in ``manifold.retractions``, by default the first: Euclidean and scale-invariant ``add``;
            sphere and oblique ``projection`` ``s (x + v)/||x + v||`` or ``exp``; Stiefel ``qr`` (the Q factor with
            positive diagonal of R), ``polar``, ``cayley`` or ``exp``; Grassmann ``exp``.

    Raises:
        ValueError: unknown retraction, shapes that differ.
        TypeError: other types than float32 and float64.

    >>> retr("sphere", torch.tensor([[4.0], [0.0]]) / 4, torch.tensor([[0.0], [0.75]])).flatten().tolist()
    [0.800000011920929, 0.6000000238418579]
    """
    of = manifolds.manifold(manifold)
    geometry, s = _geometry(of, x, v=v)
    manifolds.retraction_code(of, retraction)
    name = retraction or of.retractions[0]
    if isinstance(of, Stiefel) and name in _DECOMPOSITIONS:
        return s * _DECOMPOSITIONS[name](x + v)
    return geometry.retractions[name].retract(x, v, s)


def expmap(manifold: Spec, x: Tensor, v: Tensor) -> Tensor:
    """The exponential map: where the geodesic that leaves ``x`` with velocity ``v`` is at time 1.

    sphere ``x cos(|v|/s) + s v/|v| sin(|v|/s)``, oblique per column, Stiefel Edelman, Arias & Smith (1998), Eq. 2.7
    (Euclidean metric). The scale-invariant quotient has none here and raises ``NotImplementedError``.

    >>> expmap("sphere", torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [torch.pi]])).flatten()[0].item()
    -1.0
    """
    geometry, s = _geometry(manifold, x, v=v)
    if geometry.expmap is None:
        raise NotImplementedError(f"expmap: {manifold} has no closed form here. Use retr.")
    return geometry.expmap(x, v, s)


def transp(manifold: Spec, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """A tangent ``v`` at ``x`` taken to ``y`` by projection onto the tangent space at ``y``.

    >>> transp("sphere", torch.eye(2)[:, :1], torch.eye(2)[:, 1:], torch.tensor([[0.0], [2.0]])).flatten().tolist()
    [0.0, 0.0]
    """
    _geometry(manifold, x, y=y, v=v)
    return proj(manifold, y, v)


def dist(manifold: Spec, x: Tensor, y: Tensor) -> Tensor:
    """The geodesic distance, shape ``(...)``.

    Euclidean ``||x - y||``, sphere ``s`` times the angle, oblique the root of the columns' sum of squares, Grassmann
    the angle between the lines, scale-invariant the angle. Stiefel has none and raises ``NotImplementedError``.

    >>> round(dist("sphere", torch.eye(2)[:, :1], torch.eye(2)[:, 1:]).item(), 4)
    1.5708
    """
    geometry, s = _geometry(manifold, x, y=y)
    if geometry.dist is None:
        raise NotImplementedError(f"dist: {manifold} has no closed form.")
    return geometry.dist(x, y, s)


def violation(manifold: Spec, x: Tensor) -> Tensor:
    """How far ``x`` is off the manifold, relative to ``s``, shape ``(...)``.

    sphere and Grassmann ``| ||x||/s - 1 |``, oblique the largest of the columns, Stiefel ``max |x^T x/s^2 - I|``
    (``x x^T`` where n < p), 0 for the others.

    >>> violation("sphere", torch.tensor([[3.0], [4.0]])).item()
    4.0
    """
    geometry, s = _geometry(manifold, x)
    return geometry.violation(x, s)


def qr(x: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The thin QR decomposition with ``diag(r) >= 0``: q ``(..., n, k)`` and r ``(..., k, p)``, k = min(n, p).

    Unique where the first k columns of x are independent; q is orthonormal for any finite x, also where columns are
    zero or repeat each other. Differentiable any number of times where the first k columns are independent. A matrix
    with NaN or Inf has NaN in all of q, and in r from the diagonal on.

    On the CPU matrices of up to 2048 elements take the compiled kernels, many at a time, which is many times faster
    than :func:`torch.linalg.qr`; on a GPU those of up to 16384 elements do, in one launch. The Triton backend takes
    matrices of up to 4096 elements in float32, 2048 in float64, sides counted as powers of two. Larger ones, other
    devices and the reference backend take that function. For a given x, the kernels of a device give the same bits at
    any place in a batch and for any number of threads.

    Args:
        x: matrices ``(..., n, p)``.
        backend: ``"auto"`` or a name in :func:`manifold_kernels.ops.backends`, as in the optimizers.

    Raises:
        ValueError: no matrices, or empty ones; an unknown backend, or one for another device.
        TypeError: other types than float32 and float64.
        RuntimeError: a backend that cannot be used here.

    >>> qr(torch.tensor([[-2.0], [0.0]]))[1].item()
    2.0
    """
    decompositions.check_matrices("x", x)
    return decompositions.qr(x, backend)


def qf(x: Tensor, *, backend: str = "auto") -> Tensor:
    """The q of :func:`qr` alone, to which the "qr" retraction takes ``x = w + v``.

    >>> qf(torch.tensor([[-2.0], [0.0]])).tolist()
    [[-1.0], [0.0]]
    """
    decompositions.check_matrices("x", x)
    return decompositions.qf(x, backend)


def polar(x: Tensor, *, backend: str = "auto") -> Tensor:
    """The orthonormal factor ``x (x^T x)^{-1/2}`` of the polar decomposition (rows orthonormal where n < p).

    The nearest matrix with orthonormal columns, for any finite x: where the rank is not full there are several, and
    it is one of them. Differentiable any number of times where x has full rank, repeated singular values included. A
    matrix with NaN or Inf becomes NaN. Kernels, bits and errors as for :func:`qr`, :func:`torch.linalg.svd`
    elsewhere.

    >>> polar(torch.diag(torch.tensor([2.0, 3.0]))).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    decompositions.check_matrices("x", x)
    return decompositions.polar(x, backend)


def orthogonality_penalty(rows: Tensor, alpha: float) -> Tensor:
    """``(alpha/2) ||Y Y^T - I||_F^2`` for ``Y`` of shape ``(..., D, n)``, shape ``(...)``.

    The regulariser of SGD-G and Adam-G (Cho & Lee 2017; [PSI] Table 3 has alpha = 0.1).

    >>> orthogonality_penalty(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), alpha=0.1).item()
    0.10000000149011612
    """
    decompositions.check_matrices("rows", rows)
    gram = rows @ rows.mT
    return alpha / 2 * (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).square().sum((-2, -1))


@torch.no_grad()
def project_weight_(manifold: Spec, weight: Tensor, layout: Layout, scale: float | None = None) -> None:
    """Move every component of ``weight`` to the nearest point of the manifold, in place.

    Args:
        manifold: where to.
        weight: a weight of any floating-point type and strides; computed in float64 and rounded once.
        layout: how it becomes matrices.
        scale: the scale ``s``, by default the manifold's (``fit.scale_of``, ``"fan"`` included).

    Raises:
        ValueError: a layout that does not fit; NaN or Inf in the weight.

    >>> w = torch.ones(2, 2)
    >>> project_weight_("sphere", w, Layout("matrix"))
    >>> w[0, 0].item()
    0.5
    """
    of, geometry, s, batch = _weight(manifold, weight, layout, scale)
    if not bool(batch.isfinite().all()):
        raise ValueError(
            f"weight: wanted finite numbers to project onto {of.name}, got NaN or Inf. Initialise it again."
        )
    if batch.numel():
        views.write_matrices(weight, layout, geometry.projx(batch, s).to(weight.dtype))


@torch.no_grad()
def weight_violation(manifold: Spec, weight: Tensor, layout: Layout, scale: float | None = None) -> float:
    """The largest :func:`violation` of the components of ``weight``; arguments as in :func:`project_weight_`.

    >>> weight_violation("sphere", torch.ones(2, 2), Layout("matrix"))
    1.0
    """
    _, geometry, s, batch = _weight(manifold, weight, layout, scale)
    return float(geometry.violation(batch, s).max()) if batch.numel() else 0.0


def _upright_qf(x: Tensor) -> Tensor:
    return qf(x.mT).mT if x.shape[-2] < x.shape[-1] else qf(x)


#: Retractions on Stiefel that are a decomposition of ``x + v``.
_DECOMPOSITIONS = {"qr": _upright_qf, "polar": polar}


def _weight(
    manifold: Spec, weight: Tensor, layout: Layout, scale: float | None
) -> tuple[Manifold, Geometry, float, Tensor]:
    of = manifolds.manifold(manifold)
    if not weight.is_floating_point():
        raise TypeError(f"weight: wanted a floating-point tensor, got {weight.dtype}. Convert it with .float().")
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale: wanted a finite number > 0 or None (the manifold's own), got {scale!r}.")
    batch = views.matrices(weight, layout).double()
    _check_vectors(of, "weight", batch)
    return of, GEOMETRIES[of.code], fit.scale_of(of, layout, weight) if scale is None else scale, batch


def _geometry(manifold: Spec, x: Tensor, **others: Tensor) -> tuple[Geometry, float]:
    """The functions and the scale of ``manifold``, for arguments that have been checked."""
    of = manifolds.manifold(manifold)
    scale = getattr(of, "scale", "unit")
    if scale == "fan":
        raise ValueError(
            f"manifold: wanted a scale in numbers or 'unit', got {of!r}. 'fan' depends on a weight: put "
            "fit.scale_of(manifold, layout, weight) in its place."
        )
    decompositions.check_matrices("x", x)
    _check_vectors(of, "x", x)
    for name, other in others.items():
        if other.shape != x.shape or other.dtype != x.dtype or other.device != x.device:
            raise ValueError(
                f"{name}: wanted {tuple(x.shape)}, {x.dtype} on {x.device} as x, got {tuple(other.shape)}, "
                f"{other.dtype} on {other.device}. Expand or convert it."
            )
    return GEOMETRIES[of.code], 1.0 if scale == "unit" else float(scale)


def _check_vectors(of: Manifold, name: str, x: Tensor) -> None:
    if isinstance(of, Grassmann) and x.shape[-1] != 1:
        raise ValueError(
            f"{name}: wanted vectors (..., n, 1) on {of.name}, got {tuple(x.shape)}. Use the 'filter' view."
        )
