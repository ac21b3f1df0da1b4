"""FG-SGD: [FG] Algorithm 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from manifold_kernels.manifolds import Manifold, Oblique, Sphere, Stiefel
from manifold_kernels.optim.base import ManifoldOptimizer
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
        curvature: c, a bound on the sectional curvature, for ``"general"``.
        grouping: ``"layer"``: the components of a parameter are one group; ``"individual"``: each is its own.
        manifold: ``Sphere``, ``Oblique`` or ``Stiefel``, or a name.
        view: ``"kernel"``, ``"filter"``, ``"matrix"``, or ``None`` for the layer's default.
        retraction: ``None`` for the manifold's default, or a name in its ``retractions``.
        nonfinite: ``"skip"`` leaves components without a finite gradient or momentum as they are and counts them
            (:meth:`nonfinite_count`); ``"raise"`` raises ``ValueError`` before anything is written.
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
    accepts = (Sphere, Oblique, Stiefel)
    euclidean_only: ClassVar[Mapping[str, object]] = {"weight_decay": 0.0}
    manifold_only: ClassVar[Mapping[str, object]] = {
        **ManifoldOptimizer.manifold_only,
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
        retraction: str | None = None,
        nonfinite: str = "skip",
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
        super().__init__(params, defaults, nonfinite=nonfinite, backend=backend)

    def _neutral(self, group: ParamGroup) -> dict[str, object]:
        neutral = super()._neutral(group)
        step_size = neutral.get("step_size", group["step_size"])
        return neutral if step_size == "general" else {**neutral, **_COROLLARY2}

    def _group_of(self, position: int, index: int, layout: Layout, scale: float) -> Group:
        group = self.param_groups[index]
        return replace(
            super()._group_of(position, index, layout, scale),
            individual=group["grouping"] == "individual",
            step_size="none" if group["step_size"] == "none" else "general",
        )
