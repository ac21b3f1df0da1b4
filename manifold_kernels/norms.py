"""Norms of weights and of groups of weights, beside the bounds that hold for them ([FG] Tables II and IV, Prop. 1)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manifold_kernels.manifolds import BY_NAME, MANIFOLDS, Manifold, Oblique, Sphere, Stiefel
from manifold_kernels.optim.base import ManifoldOptimizer
from manifold_kernels.optim.constraint import tolerance
from manifold_kernels.plan import GROUP_COLUMNS, Plan
from manifold_kernels.views import matrices, shape_of

if TYPE_CHECKING:
    from rich.table import Table

#: What stands in the last dimension of tensors of norms.
NORMS: tuple[str, ...] = ("frobenius", "spectral", "2->1")

_BY_CODE: dict[int, type[Manifold]] = {of.code: of for of in MANIFOLDS}


def matrix_norms(x: Tensor) -> Tensor:
    """The Frobenius, spectral and 2->1 norms of matrices ``(..., n, p)``: ``(..., 3)`` in float64.

    The 2->1 norm is "the sum of the Euclidean norms for all rows" ([FG] Table I), ``sum_i (sum_j x_ij^2)^(1/2)``; of
    a vector ``n x 1``, whose rows are single elements, it is the sum of absolute values. The spectral norm is the root
    of the largest eigenvalue of the smaller Gram matrix, accurate to rounding. NaN or Inf in a matrix make it NaN.

    >>> matrix_norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [5.0, 5.0, 5.0]
    """
    x = x.detach().double()
    finite = x.isfinite().all(-1).all(-1)
    rows = torch.linalg.vector_norm(x, dim=-1)
    gram = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x
    gram = torch.where(finite[..., None, None], gram, 0.0)  # LAPACK raises on NaN
    largest = torch.linalg.eigvalsh(gram)[..., -1].clamp(min=0)
    spectral = torch.where(finite, largest.sqrt(), torch.nan)
    return torch.stack([torch.linalg.vector_norm(rows, dim=-1), spectral, rows.sum(-1)], dim=-1)


def norm_bounds(manifold: str, n: int, p: int) -> tuple[float, float, float]:
    """The least upper bounds of the three norms over the ``n x p`` matrices of a manifold of scale 1.

    ======== =============== ============== ===============
    manifold Frobenius       spectral       2->1
    ======== =============== ============== ===============
    sphere   1               1              ``sqrt(n)``
    oblique  ``sqrt(p)``     ``sqrt(p)``    ``sqrt(n p)``
    Stiefel  ``sqrt(m)``     1              ``sqrt(n m)``, m = min(n, p)
    ======== =============== ============== ===============

    The first column is the norm that all points have. The spectral norm is at most that, reached where the rank is
    one; on Stiefel all singular values are 1. The sum of n row norms is at most ``sqrt(n)`` times the root of their sum
    of squares (Cauchy-Schwarz), reached where rows are equally long: always on Stiefel with n <= p.

    K matrices side by side, of scales ``s_k``, are bounded by the same numbers times ``sqrt(sum s_k^2)``: squares of
    Frobenius norms add up, the spectral norm follows from it (Stiefel: from
    ``sum W_k W_k^T <= sum s_k^2 I``), and the rows are n still. Without a scale (Euclidean, scale-invariant) there are
    no bounds: infinity. Grassmann points are unit vectors, as on the sphere.

    [FG] Table IV has 1 (sphere) and ``p^(1/4)`` for the 2->1 norm: see :func:`claimed_two_to_one`.

    >>> norm_bounds("stiefel", 4, 9)
    (2.0, 1.0, 4.0)
    """
    rank = min(n, p)
    of = _manifold(manifold)
    if of is Oblique:
        return math.sqrt(p), math.sqrt(p), math.sqrt(n * p)
    if of is Stiefel:
        return math.sqrt(rank), 1.0, math.sqrt(n * rank)
    if of is Sphere or manifold == "grassmann":
        return 1.0, 1.0, math.sqrt(n)
    return math.inf, math.inf, math.inf


def claimed_two_to_one(manifold: str, p: int) -> float:
    """The 2->1 norm at scale 1 that [FG] Tables II and IV give for matrices of p columns; it is exceeded.

    1 on the sphere, ``p^(1/4)`` on the oblique and Stiefel manifolds (where 3 x 3 Stiefel has 3, not 1.32); infinity on
    others. The other two norms of these tables agree with :func:`norm_bounds` for n >= p.

    >>> round(claimed_two_to_one("stiefel", 3), 2)
    1.32
    """
    of = _manifold(manifold)
    if of is Sphere:
        return 1.0
    return p**0.25 if of in (Oblique, Stiefel) else math.inf


def _manifold(name: str) -> type[Manifold]:
    if name not in BY_NAME:
        raise ValueError(f"manifold: wanted one of {sorted(BY_NAME)}, got {name!r}.")
    return BY_NAME[name]


@dataclass(frozen=True)
class WeightNorms:
    """Norms of the components of one parameter on one manifold and of their groups, in float64.

    The last dimension of norms and bounds is :data:`NORMS`. A group's matrix is its components side by side,
    ``n x (K p)``.

    Attributes:
        parameter: position of the parameter in the optimizer.
        name: its name, or its position where the optimizer knows none.
        manifold: name of the manifold.
        n: rows of a component.
        p: columns of a component.
        members: ``(components,)``, the components' numbers.
        components: ``(components, 3)``, their norms.
        component_bounds: ``(components, 3)``, what bounds them: :func:`norm_bounds` times the scale.
        claimed: ``(components,)``, the 2->1 norms of [FG] Table IV: :func:`claimed_two_to_one` times the scale.
        rows: ``(groups,)``, the row of the plan that a group is in.
        groups: ``(groups, 3)``, the groups' norms.
        group_bounds: ``(groups, 3)``, what bounds them: :func:`norm_bounds` times ``sqrt(sum s_k^2)``.
        slack: how far, relative to a bound, rounding may carry a weight that ``optimizer.check()`` lets pass. An
            element of ``W^T W/s^2 - I`` may be off by its tolerance t, so that a norm is by ``t/2``; for the spectral
            norm of m x m such errors, independent of each other, by ``t sqrt(m)``.
    """

    parameter: int
    name: str
    manifold: str
    n: int
    p: int
    members: Tensor
    components: Tensor
    component_bounds: Tensor
    claimed: Tensor
    rows: Tensor
    groups: Tensor
    group_bounds: Tensor
    slack: float

    @property
    def holds(self) -> bool:
        """Whether all norms are within their bounds, up to :attr:`slack`; False where any is NaN."""
        return not bool(self.component_violations.any() or self.group_violations.any())

    @property
    def component_violations(self) -> Tensor:
        """``(components, 3)``: which norms exceed their bounds by more than :attr:`slack`, or are NaN."""
        return ~(self.components <= self.component_bounds * (1 + self.slack))

    @property
    def group_violations(self) -> Tensor:
        """``(groups, 3)``: the same of the groups."""
        return ~(self.groups <= self.group_bounds * (1 + self.slack))

    @property
    def components_at_most_one(self) -> bool:
        """Whether all norms of all components are <= 1, up to :attr:`slack` ([FG] Proposition 1).

        With the scales of :class:`~manifold_kernels.renormalize.Renormalizer`, ``s <= (C A B + H W D)^(-1/2)``, it
        holds for ``kernel`` and ``filter`` views, whose bounds are at most ``s sqrt(A B)`` and ``s sqrt(C A B)``. The
        2->1 norm of a ``matrix`` view may be larger.
        """
        return bool((self.components <= 1 + self.slack).all())

    @property
    def groups_at_most_one(self) -> bool:
        """The same of the groups. With K renormalised kernels it holds if ``K A B <= C A B + H W D``.

        That is always so for groups within one output (PO, K <= C), and not for a whole layer: 512 x 512 orthonormal
        kernels of 3 x 3 on maps of 7 x 7 have a Frobenius norm of 5.1.
        """
        return bool((self.groups <= 1 + self.slack).all())


def weight_norms(optimizer: ManifoldOptimizer) -> list[WeightNorms]:
    """Frobenius, spectral and 2->1 norms of every component and group of the plan, beside their bounds.

    One record for each parameter and manifold. Components that have a view but no constraint (Euclidean ones of a
    collection, scale-invariant ones) are measured too, with infinite bounds; parameters that are Euclidean as a whole,
    which have no components, are left out, empty ones too.

    Args:
        optimizer: any optimizer of the package.

    >>> from manifold_kernels.optim import FGSGD
    >>> optimizer = FGSGD([torch.nn.Parameter(torch.eye(3))], lr=0.1, manifold="stiefel", backend="reference")
    >>> [found] = weight_norms(optimizer)
    >>> [round(norm, 4) for norm in found.components[0].tolist()], found.holds
    ([1.7321, 1.0, 3.0], True)
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = optimizer.parameter_names()
    plan = optimizer.plan
    own: dict[tuple[int, int], list[int]] = {}
    for row, key in enumerate(zip(plan.column("parameter").tolist(), plan.column("manifold").tolist(), strict=True)):
        own.setdefault(key, []).append(row)
    return [
        _measured(plan, rows, position, names[position], _BY_CODE[code].name, parameters[position])
        for (position, code), rows in own.items()
        if plan.layout(rows[0]).view != "flat" and parameters[position].numel()
    ]


def _measured(plan: Plan, rows: list[int], position: int, name: str, manifold: str, weight: Tensor) -> WeightNorms:
    """The norms of the components in ``rows`` of the plan, those of groups of one size measured together."""
    layout = plan.layout(rows[0])
    shape = shape_of(weight, layout)
    batch = matrices(weight.detach(), layout).double()
    scale_of = torch.empty(shape.count, dtype=torch.float64, device="cpu")
    individual = plan.groups[:, GROUP_COLUMNS.index("individual")].tolist()
    sized: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for row in rows:
        members = plan.members(row)
        scale_of[members] = plan.scale(row)
        members = members.reshape(-1, 1) if individual[row] else members.reshape(1, -1)
        sized.setdefault(members.shape[1], []).append((members, torch.full((members.shape[0],), row, device="cpu")))
    factors = torch.tensor(norm_bounds(manifold, shape.n, shape.p), dtype=torch.float64, device="cpu")
    found: list[tuple[Tensor, ...]] = []
    for groups in sized.values():
        members = torch.cat([each for each, _ in groups])
        chosen = batch[members.to(batch.device)]  # (groups, K, n, p)
        components = matrix_norms(chosen).cpu()
        beside = chosen.transpose(1, 2).flatten(2)  # (groups, n, K p)
        scales = scale_of[members]
        found.append(
            (
                members.flatten(),
                components.flatten(0, 1),
                scales.flatten(),
                torch.cat([row for _, row in groups]),
                components[:, 0] if members.shape[1] == 1 else matrix_norms(beside).cpu(),
                scales.square().sum(1).sqrt(),
            )
        )
    numbers, components, scales, of_row, norms, joint = (torch.cat(parts) for parts in zip(*found, strict=True))
    return WeightNorms(
        parameter=position,
        name=name,
        manifold=manifold,
        n=shape.n,
        p=shape.p,
        members=numbers,
        components=components,
        component_bounds=scales[:, None] * factors,
        claimed=scales * claimed_two_to_one(manifold, shape.p),
        rows=of_row,
        groups=norms,
        group_bounds=joint[:, None] * factors,
        slack=math.sqrt(min(shape.n, shape.p)) * tolerance(weight.dtype, shape.n, shape.p),
    )


def norms_table(norms: Iterable[WeightNorms]) -> Table:
    """The records of :func:`weight_norms` as a table: for every weight and manifold, its components and its groups.

    A cell has the norm that comes closest to its bound and, after a slash, that bound (without one, the largest norm).
    ``!`` marks one above it, by more than rounding explains. ``<= 1`` tells whether all three norms are, as [FG]
    Proposition 1 says of renormalised components; the last column counts the components whose 2->1 norm is above the
    one that [FG] Table IV gives.
    """
    from rich.table import Table

    table = Table("weight", "manifold", "matrices", *NORMS, "<= 1", "above Table IV", title="norms of weights")
    for one in norms:
        above = int((one.components[:, 2] > one.claimed * (1 + one.slack)).sum())
        claim = f"{above} of {len(one.components)}" if bool(one.claimed.isfinite().all()) else ""
        table.add_row(
            one.name,
            one.manifold,
            f"{len(one.components)} of {one.n}x{one.p}",
            *_cells(one.components, one.component_bounds, one.component_violations),
            "yes" if one.components_at_most_one else "no",
            claim,
        )
        table.add_row(
            "",
            "",
            f"{len(one.groups)} groups",
            *_cells(one.groups, one.group_bounds, one.group_violations),
            "yes" if one.groups_at_most_one else "no",
            "",
            end_section=True,
        )
    return table


def _cells(norms: Tensor, bounds: Tensor, violations: Tensor) -> list[str]:
    bounded = bool(bounds.isfinite().all())
    worst = (norms / bounds if bounded else norms).argmax(0)  # of NaN, where there is one
    cells = []
    for column, row in enumerate(worst.tolist()):
        cell = f"{norms[row, column]:.4g}" + (f" / {bounds[row, column]:.4g}" if bounded else "")
        cells.append(f"[bold red]{cell} ![/]" if bool(violations[:, column].any()) else cell)
    return cells
