"""How far weights are from their manifolds, and how far rounding may take them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_kernels.functional import weight_violation
from manifold_kernels.manifolds import MANIFOLDS, Euclidean, Manifold
from manifold_kernels.plan import Plan
from manifold_kernels.reference.registry import GEOMETRIES
from manifold_kernels.views import Layout, matrices, write_matrices

_BY_CODE: dict[int, type[Manifold]] = {of.code: of for of in MANIFOLDS}


@dataclass(frozen=True)
class Violation:
    """The worst component of a parameter on a manifold: how far it is off, relative to its scale, and may be."""

    parameter: int
    manifold: str
    violation: float
    tolerance: float


def violations(plan: Plan, parameters: Sequence[Tensor], first: int = 0) -> Iterator[Violation]:
    """The violation of every manifold of every parameter that has a constraint, from parameter ``first`` on.

    Components are divided by their scales in float64 and measured against the manifold of scale 1.
    """
    rows: dict[tuple[int, int], list[int]] = {}  # a collection has many rows, measured together
    for row, key in enumerate(zip(plan.column("parameter").tolist(), plan.column("manifold").tolist(), strict=True)):
        rows.setdefault(key, []).append(row)
    for (owner, code), own in rows.items():
        of = _BY_CODE[code]
        weight = parameters[owner]
        if owner < first or of is Euclidean or not weight.numel():
            continue
        listed = [plan.members(row) for row in own]
        scales = torch.cat([plan.scale(row).expand(one.numel()) for row, one in zip(own, listed, strict=True)])
        members = torch.cat(listed).to(weight.device)
        batch = matrices(weight.detach(), plan.layout(own[0]))[members].double()
        batch /= scales.to(weight.device).reshape(-1, 1, 1)
        # Seen as a weight of one input and as many outputs as there are components, whose kernels they are.
        worst = weight_violation(of(), batch.unsqueeze(1), Layout("kernel"))
        yield Violation(owner, of.name, worst, tolerance(weight.dtype, batch.shape[-2], batch.shape[-1]))


@torch.no_grad()
def place_(plan: Plan, position: int, weight: Tensor) -> None:
    """Move every component of ``weight``, of the shape of parameter ``position``, to the nearest point of its manifold.

    Computed in float64 and rounded once. Components that are not finite stay.
    """
    for row in (plan.column("parameter") == position).nonzero().flatten().tolist():
        code = int(plan.column("manifold")[row])
        if _BY_CODE[code] is Euclidean or not weight.numel():
            continue
        layout, members = plan.layout(row), plan.members(row).to(weight.device)
        batch = matrices(weight, layout).double()
        own, scale = batch[members], plan.scale(row).to(weight.device).reshape(-1, 1, 1)
        finite = own.isfinite().flatten(1).all(1).reshape(-1, 1, 1)
        placed = GEOMETRIES[code].projx(torch.where(finite, own, 1.0) / scale, 1.0) * scale
        batch[members] = torch.where(finite, placed, own)
        write_matrices(weight, layout, batch.to(weight.dtype))


def tolerance(dtype: torch.dtype, n: int, p: int) -> float:
    """The violation, relative to the scale, that storage and arithmetic in ``dtype`` may cause for ``n x p`` matrices.

    Let u be the rounding of the storage type (eps/2) and v that of the arithmetic (float32 below 32 bits). Elements of
    ``Q`` rounded by up to u each change a norm by up to u, relative to it, and an element of ``Q^T Q`` by up to 2 u
    (Cauchy-Schwarz on unit columns). Sums of up to n p products err by about ``v sqrt(n p)`` where roundings are
    independent. Both are multiplied by 8, so that weights from somebody else's float32 routine pass too.
    """
    storage = torch.finfo(dtype).eps / 2
    arithmetic = min(storage, torch.finfo(torch.float32).eps / 2)
    return 8 * (2 * storage + arithmetic * math.sqrt(n * p))
