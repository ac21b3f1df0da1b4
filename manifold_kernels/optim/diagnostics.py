"""What the step sizes of the last step were: R_g and tau_g of [FG] Theorem 1 and Eq. 5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manifold_kernels.manifolds import MANIFOLDS
from manifold_kernels.plan import HYPER_COLUMNS, STEP_SIZES, Plan
from manifold_kernels.reference.rules import step_size_factor

if TYPE_CHECKING:
    from rich.table import Table

_NAMES = {manifold.code: manifold.name for manifold in MANIFOLDS}


@dataclass(frozen=True)
class Diagnostics:
    """One entry for each group of components that shares a step size, in the order of the plan.

    Attributes:
        parameter: int64, the position of the parameter in the optimizer.
        component: int64, the number of the component that is a group of its own, -1 for a larger group.
        size: int64, the number of components in the group.
        manifold: int64, ``Manifold.code``.
        norm: float64, ``R_g = sqrt(sum ||xi||^2)``, the norm of what was stepped along ([FG] Theorem 1). NaN where
            nothing was: the parameter had no gradient, or the component was left out as not finite.
        tau: float64, ``tau_g`` ([FG] Eq. 5), which divided the learning rate.
    """

    parameter: Tensor
    component: Tensor
    size: Tensor
    manifold: Tensor
    norm: Tensor
    tau: Tensor

    def table(self, names: Sequence[str]) -> Table:
        """Median and largest R and tau of every parameter on each of its manifolds, and how many groups were bounded.

        Args:
            names: the parameters' names, ``optimizer.parameter_names()``.
        """
        from rich.table import Table

        table = Table("parameter", "manifold", title="step sizes", caption="bounded: groups with tau > 1")
        for heading in ("groups", "R median", "R largest", "tau median", "tau largest", "bounded"):
            table.add_column(heading, justify="right")
        pairs = torch.stack([self.parameter, self.manifold], dim=1)
        for parameter, code in torch.unique(pairs, dim=0).tolist():
            own = (self.parameter == parameter) & (self.manifold == code) & ~self.norm.isnan()
            r, tau = self.norm[own], self.tau[own]
            cells = (
                [f"{each:.3g}" for each in (r.median(), r.max(), tau.median(), tau.max())] if r.numel() else [""] * 4
            )
            table.add_row(names[parameter], _NAMES[code], str(r.numel()), *cells, str(int((tau > 1).sum())))
        return table


def entries(plan: Plan) -> int:
    """How many norms a step over ``plan`` reports: one a group, or one a component where it is ``individual``."""
    individual = plan.column("individual").bool()
    return int(torch.where(individual, plan.column("count"), 1).sum())


def read(plan: Plan, norms: Tensor, hyper: Tensor) -> Diagnostics:
    """The diagnostics of a step over ``plan`` that reported ``norms`` with the table ``hyper``."""
    individual = plan.column("individual").bool()
    lengths = torch.where(individual, plan.column("count"), 1)
    row = torch.arange(len(plan.groups), device="cpu").repeat_interleave(lengths)
    together = torch.tensor([-1], device="cpu")
    alone = [plan.members(r) if bool(individual[r]) else together for r in range(len(plan.groups))]
    own = hyper[plan.column("hyper")[row]]
    tau = step_size_factor(norms, own[:, HYPER_COLUMNS.index("rho")], own[:, HYPER_COLUMNS.index("curvature")])
    bounded = plan.column("step_size")[row] == STEP_SIZES["general"]
    return Diagnostics(
        parameter=plan.column("parameter")[row],
        component=torch.cat(alone) if alone else torch.empty(0, dtype=torch.int64, device="cpu"),
        size=torch.where(individual, 1, plan.column("count"))[row],
        manifold=plan.column("manifold")[row],
        norm=norms.clone(),
        tau=torch.where(bounded, tau, torch.where(norms.isnan(), norms, 1.0)),
    )
