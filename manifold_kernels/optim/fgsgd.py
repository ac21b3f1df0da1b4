"""FG-SGD: [FG] Algorithm 1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from manifold_kernels import collection, fit, views
from manifold_kernels.collection import Assignment, Collection, retraction_codes
from manifold_kernels.manifolds import Euclidean, Manifold, Oblique, Sphere, Stiefel
from manifold_kernels.optim import diagnostics, gathering
from manifold_kernels.optim.base import ManifoldOptimizer
from manifold_kernels.optim.diagnostics import Diagnostics
from manifold_kernels.optim.operands import local
from manifold_kernels.optim.settings import ParamGroup
from manifold_kernels.plan import Group
from manifold_kernels.views import Layout

#: What Corollary 2 ([FG] Eq. 7) puts for rho and c, and what stands where a rule has none of them.
_COROLLARY2 = {"rho": 1.0, "curvature": 0.0}


class FGSGD(ManifoldOptimizer):
    """Stochastic gradient descent on products of manifolds, [FG] Algorithm 1.

    With the weights ``W`` of a group g of components, their gradients ``G`` and momentum ``M`` (all sums over g)::

        M   <- momentum M + (1 - dampening) G               [FG] Eq. 31; M = G at the first step
        xi  =  P_W(M),    R = sqrt(sum ||xi||_F^2)          Theorem 1
        tau =  max(1, R (2 + R))                            "corollary2", Eq. 7
            =  sqrt(max(1, R^2 max((2 rho + R)^2, 1 + c (rho + R))))      "general", Eq. 5
            =  1                                            "none"
        W   <- R_W(-(lr/tau) xi)

    Groups without a manifold take the step of ``torch.optim.SGD`` with the same settings.

    Args:
        params: parameters or param groups; see :class:`ManifoldOptimizer` for what a group may set.
        lr: learning rate, >= 0.
        momentum: theta_mu of Eq. 31.
        dampening: 1 - theta_E of Eq. 31.
        weight_decay: for Euclidean groups only: on a manifold of fixed norm it is radial and projected away, so that a
            group on a manifold that sets it raises.
        nesterov: steps along ``G + momentum M`` instead of ``M``, as in torch; needs momentum and no dampening.
        maximize: steps uphill.
        step_size: ``"corollary2"``, ``"general"`` or ``"none"``.
        rho: a bound on the distance to the minimum, for ``"general"``.
        curvature: c, in [FG] a bound on the sectional curvature, for ``"general"``; up to 3 without effect at rho = 1.
        grouping: ``"layer"``: the components of a parameter are one group; ``"individual"``: each is its own.
        manifold: ``Sphere``, ``Oblique`` or ``Stiefel``, a name, or in groups made by
            :func:`manifold_kernels.partition` a ``Collection``, with its ``assignments``.
        view: ``"kernel"``, ``"filter"``, ``"matrix"``, or ``None`` for the layer's default.
        retraction: ``None`` for the manifold's default, or a name in its ``retractions``; for a collection one that all
            of its manifolds have, or names by manifold: ``{"stiefel": "polar"}``.
        diagnostics: keep R and tau of every group for :meth:`diagnostics` to read.
        master_weights: step bfloat16 and float16 parameters through float32 masters, whose roundings they become.
        nonfinite: ``"skip"`` leaves components without a finite gradient or momentum as they are and counts them
            (:meth:`nonfinite_count`); ``"raise"`` raises ``ValueError`` before anything is written.
        cut_matrices: ``"raise"`` raises ``ValueError`` for matrices that a sharding cuts, ``"gather"`` steps them whole
            on every rank.
        backend: ``"auto"`` or a name in :func:`manifold_kernels.ops.backends`.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.eye(3))
    >>> optimizer = FGSGD([weight], lr=0.1, momentum=0.9, manifold="stiefel", backend="reference")
    >>> weight.grad = torch.ones(3, 3).triu()
    >>> optimizer.step()
    >>> bool(weight[0, 1] < 0), optimizer.violation() < 1e-6
    (True, True)
    """

    rule = "fg_sgd"
    rests = True
    accepts = (Sphere, Oblique, Stiefel, Collection)
    euclidean_only: ClassVar[Mapping[str, object]] = {"weight_decay": 0.0}
    manifold_only: ClassVar[Mapping[str, object]] = {
        **ManifoldOptimizer.manifold_only,
        "assignments": None,
        "grouping": "layer",
        "step_size": "none",
    }
    offered_views = ("kernel", "filter", "matrix")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        step_size: str = "corollary2",
        rho: float = 1.0,
        curvature: float = 0.0,
        grouping: str = "layer",
        manifold: Manifold | str | None = None,
        view: str | None = None,
        retraction: str | Mapping[str, str] | None = None,
        diagnostics: bool = False,
        master_weights: bool = False,
        nonfinite: str = "skip",
        cut_matrices: str = "raise",
        backend: str = "auto",
    ) -> None:
        if step_size != "general" and (rho, curvature) != (1.0, 0.0):
            raise ValueError(
                f"rho, curvature: are read with step_size='general' only, got rho={rho!r} and curvature={curvature!r} "
                f"with step_size={step_size!r}. Set step_size='general', or leave them out."
            )
        defaults = {
            **self.manifold_only,
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "step_size": step_size,
            "rho": rho,
            "curvature": curvature,
            "grouping": grouping,
            "manifold": manifold,
            "view": view,
            "retraction": retraction,
        }
        if not isinstance(diagnostics, bool):
            raise TypeError(f"diagnostics: wanted True or False, got {diagnostics!r}.")
        self._diagnosing = diagnostics
        super().__init__(
            params,
            defaults,
            master_weights=master_weights,
            nonfinite=nonfinite,
            cut_matrices=cut_matrices,
            backend=backend,
        )

    def diagnostics(self) -> Diagnostics:
        """R and tau of every group in the last step ([FG] Theorem 1 and Eq. 5).

        Raises:
            RuntimeError: the optimizer was not made with ``diagnostics=True``, or took no step since.

        >>> weight = torch.nn.Parameter(torch.eye(3))
        >>> optimizer = FGSGD([weight], lr=0.1, manifold="stiefel", diagnostics=True, backend="reference")
        >>> weight.grad = 3 * torch.ones(3, 3).triu(1)
        >>> optimizer.step()
        >>> found = optimizer.diagnostics()  # the skew half of G has the norm 3 sqrt(6)/2
        >>> round(found.norm.item(), 4), round(found.tau.item(), 4)
        (3.6742, 20.8485)
        """
        if not self._diagnosing:
            raise RuntimeError("diagnostics: wanted an optimizer made with diagnostics=True, got one that keeps none.")
        if self._norms is None:
            raise RuntimeError("diagnostics: wanted a step before the first reading, got none. Call step().")
        return diagnostics.read(self.plan, self._norms, self._hyper if self._live is None else self._live.cpu())

    def _collect(self, held: list[tuple[str | None, str | None]]) -> None:
        super()._collect(held)
        if self._diagnosing:
            self._norms = torch.full((diagnostics.entries(self.plan),), math.nan, dtype=torch.float64, device="cpu")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_diagnosing": self._diagnosing}

    def _neutral(self, group: ParamGroup) -> dict[str, object]:
        neutral = super()._neutral(group)
        of = group["manifold"]
        if isinstance(of, Collection):
            neutral["grouping"] = "layer"  # the scheme says what a group is
            if any(isinstance(member, Euclidean) for member in of.manifolds):
                del neutral["weight_decay"]
        else:
            neutral["assignments"] = None
        step_size = neutral.get("step_size", group["step_size"])
        return neutral if step_size == "general" else {**neutral, **_COROLLARY2}

    def _groups_of(self, position: int, within: int, index: int, parameter: Tensor, layout: Layout) -> list[Group]:
        group = self.param_groups[index]
        step_size = "none" if group["step_size"] == "none" else "general"
        if isinstance(group["manifold"], Collection):
            parts = collection.rows(group["manifold"], self._assignment(group, within), parameter, layout)
            codes = retraction_codes(group["manifold"], group["retraction"])
            return [
                Group(
                    position,
                    index,
                    self.rule,
                    row.manifold.code,
                    codes[row.position],
                    layout,
                    individual=row.individual,
                    scale=fit.scale_of(row.manifold, layout, parameter),
                    components=row.components,
                    step_size=step_size,
                )
                for row in parts
            ]
        individual = group["grouping"] == "individual"
        whole = super()._groups_of(position, within, index, parameter, layout)
        return [replace(row, individual=individual, step_size=step_size) for row in whole]

    @staticmethod
    def _assignment(group: ParamGroup, within: int) -> Assignment:
        """The assignment of parameter ``within`` of ``group``, which lies on a collection."""
        assignments = group["assignments"]
        if not isinstance(assignments, (tuple, list)) or len(assignments) != len(group["params"]):
            raise ValueError(
                f"assignments: wanted one Assignment for each of {len(group['params'])} parameters on a collection, "
                f"got {assignments!r}. manifold_kernels.partition makes such groups."
            )
        assignment: Assignment = assignments[within]
        return assignment

    @torch.no_grad()
    def rescale(self, parameter: Tensor, scales: Tensor | float) -> None:
        """Move the components of a parameter to new scales: ``W <- W s_new/s_old``, computed in float64, rounded once.

        The momentum stays as it is ([FG] section IV). What a scale means is the manifold's: the norm on the sphere, the
        columns' norm on the oblique manifold, all singular values on Stiefel. Euclidean components have none and stay.

        Args:
            parameter: a parameter of this optimizer.
            scales: one scale for all components, or float64 ``(components,)``, > 0 (numbers of Euclidean components are
                not read).

        Raises:
            ValueError: another optimizer's parameter, one without a scale, or scales of a wrong shape or value. Nothing
                was written.

        >>> weight = torch.nn.Parameter(torch.eye(3))
        >>> optimizer = FGSGD([weight], lr=0.1, manifold="stiefel", backend="reference")
        >>> optimizer.rescale(weight, 0.5)
        >>> weight[0].tolist(), optimizer.violation()
        ([0.5, 0.0, 0.0], 0.0)
        """
        position = next((at for at, own in enumerate(self._all_parameters()) if own is parameter), None)
        if position is None:
            raise ValueError(f"parameter: wanted one of this optimizer, got another of shape {tuple(parameter.shape)}.")
        try:
            plan, layout, ratios = self.plan.rescaled(position, scales)
        except ValueError as error:
            raise ValueError(f"{self._where(position)}: {error}") from None
        master = self.state[parameter].get("master") if parameter in self.state else None
        held = parameter if master is None else master
        with gathering.opened(held, position in self._gathered()) as weight:
            batch = views.matrices(weight, layout)
            moved = batch.double() * ratios.to(weight.device).reshape(-1, 1, 1)
            views.write_matrices(weight, layout, moved.to(weight.dtype))
        if master is not None:
            local(parameter).copy_(local(master))
        self.plan = plan
