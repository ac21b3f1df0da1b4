"""The methods that the demo compares, with the learning rates that suit them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from manifold_kernels.optim import FGSGD, PSISGD
from manifold_kernels.routing import param_groups


@dataclass(frozen=True)
class Method:
    """How a network is to be trained; ``optimizer`` also puts its weights on their manifolds."""

    name: str
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _fg(model: nn.Module) -> torch.optim.Optimizer:
    """Convolutions in turn on spheres, oblique and Stiefel manifolds and left free, at the fan scale."""
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    collection = ("sphere", "oblique", "stiefel", None)
    rules = {name: collection[index % len(collection)] for index, name in enumerate(convolutions)}
    return FGSGD(param_groups(model, "sphere", rules=rules, euclidean={"lr": 0.1}), lr=1.0, momentum=0.9)


def _psi(model: nn.Module, lr: float, momentum: float) -> torch.optim.Optimizer:
    return PSISGD(param_groups(model, "scale_invariant", euclidean={"lr": 0.1}), lr=lr, momentum=momentum)


METHODS: tuple[Method, ...] = (
    Method("SGD", _sgd),
    Method("FG-SGD", _fg),
    Method("PSI-SGD", lambda model: _psi(model, 2.0, 0.0)),
    Method("PSI-SGDM", lambda model: _psi(model, 0.5, 0.9)),
)
