"""The optimizers to be timed: from a workload to a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from manifold_kernels.bench.workloads import Workload
from manifold_kernels.collection import Collection
from manifold_kernels.manifolds import Euclidean, Grassmann, Manifold, Oblique, ScaleInvariant, Sphere, Stiefel
from manifold_kernels.optim import FGSGD, PSISGD, SGDG, AdamG
from manifold_kernels.routing import param_groups

Step = Callable[[], object]

#: So small that weights stay what they are over thousands of steps along the same gradient; which costs the same.
LR, MOMENTUM = 1e-5, 0.9


def yardstick(workload: Workload) -> Step:
    """The step of ``torch.optim.SGD(momentum=0.9, fused=True)``."""
    return torch.optim.SGD(workload.model().parameters(), LR, momentum=MOMENTUM, fused=True).step


@dataclass(frozen=True)
class Method:
    """An optimizer of this package.

    Attributes:
        name: what tables and filters call it.
        optimizer: from a workload, its layers and a backend to an optimizer; puts the weights on their manifolds.
        accesses: how often a step must read or write an element's worth of memory: five times (w, g, m; w, m), three
            times without momentum.
    """

    name: str
    optimizer: Callable[[Workload, nn.Module, str], torch.optim.Optimizer]
    accesses: int = 5

    def step(self, workload: Workload, backend: str) -> Step:
        """The whole step, Python included, on new weights."""
        return self.optimizer(workload, workload.model(), backend).step


def constrained(
    workload: Workload, model: nn.Module, of: Manifold | Collection, **options: Any
) -> list[dict[str, Any]]:
    """The param groups of ``model`` with the weights of ``workload`` on ``of``."""
    if workload.view is not None:
        options["view"] = workload.view
    return param_groups(model, of, linear=of if workload.linear else None, **options)


def _euclidean(workload: Workload, model: nn.Module, backend: str) -> FGSGD:
    return FGSGD(model.parameters(), LR, MOMENTUM, backend=backend)


def _fg(workload: Workload, model: nn.Module, backend: str, *, of: Manifold | Collection, **options: str) -> FGSGD:
    return FGSGD(constrained(workload, model, of, **options), LR, MOMENTUM, backend=backend)


def _filters(model: nn.Module, of: Manifold) -> list[dict[str, Any]]:
    """Filters on ``of``; layers without a normalisation behind them are taken at the benchmark's word."""
    normalised = any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    return param_groups(model, of, rules={} if normalised else {"*": {"manifold": of, "rows": 1}})


def _psi(workload: Workload, model: nn.Module, backend: str, *, momentum: float) -> PSISGD:
    return PSISGD(_filters(model, ScaleInvariant()), LR, momentum, backend=backend)


def _sgdg(workload: Workload, model: nn.Module, backend: str) -> SGDG:
    return SGDG(_filters(model, Grassmann()), LR, MOMENTUM, backend=backend)


def _adamg(workload: Workload, model: nn.Module, backend: str) -> AdamG:
    return AdamG(_filters(model, Grassmann()), LR, momentum=MOMENTUM, backend=backend)


_SPHERE, _OBLIQUE, _STIEFEL = Sphere("fan"), Oblique("fan"), Stiefel("fan")
_THREE = (_SPHERE, _OBLIQUE, _STIEFEL)

#: FG-SGD takes the step sizes of Corollary 2: with one norm a component, and named ", layer" with one norm a layer.
METHODS: tuple[Method, ...] = (
    Method("euclidean", _euclidean),
    *(Method(of.name, partial(_fg, of=of, grouping="individual")) for of in _THREE),
    *(Method(f"{of.name}, layer", partial(_fg, of=of, grouping="layer")) for of in _THREE),
    Method("PIO", partial(_fg, of=Collection("pio", (*_THREE, Euclidean())))),
    Method("PSI-SGD", partial(_psi, momentum=0.0), accesses=3),
    Method("PSI-SGDM", partial(_psi, momentum=MOMENTUM)),
    Method("SGD-G", _sgdg),
    Method("Adam-G", _adamg),
)

#: Those beside the defaults, with one norm a component.
RETRACTIONS: tuple[Method, ...] = tuple(
    Method(f"{of.name} {name}", partial(_fg, of=of, grouping="individual", retraction=name))
    for of in _THREE
    for name in of.retractions[1:]
)
