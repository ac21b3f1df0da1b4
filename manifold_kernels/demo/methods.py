"""Methods by name: those that the demo compares, and those of the tables of [FG] and [PSI]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from manifold_kernels import functional
from manifold_kernels.manifolds import Grassmann
from manifold_kernels.optim import FGSGD, PSISGD, SGDG
from manifold_kernels.routing import param_groups, partition

#: What lies on no manifold takes SGD with the settings of [PSI] Table 3.
REST = {"lr": 0.1, "momentum": 0.9}

#: The regularisers of [PSI] Table 3: the factor of the weights' l2 norm, and SGD-G's alpha.
DECAY, ALPHA = 5e-4, 0.1


@dataclass(frozen=True)
class Method:
    """How a network is to be trained.

    Attributes:
        name: what tables and plots call it.
        lr: the learning rate of what lies on a manifold; for SGD and Adam of everything.
        optimizer: from a model, a learning rate and a seed (and by name ``decay``, the factor of an l2 term) to an
            optimizer; puts the weights on their manifolds.
        penalty: what is added to the loss, from the optimizer.
        renormalised: scales are recomputed at the start of every epoch ([FG] section IV).
    """

    name: str
    lr: float
    optimizer: Callable[..., torch.optim.Optimizer]
    penalty: Callable[[torch.optim.Optimizer], Tensor] | None = None
    renormalised: bool = False


def _sgd(model: nn.Module, lr: float, seed: int, decay: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=decay)


def _adam(model: nn.Module, lr: float, seed: int, decay: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=decay)


def _sgdg(model: nn.Module, lr: float, seed: int, decay: float = 0.0) -> torch.optim.Optimizer:
    """On the Grassmannian where a layer has fewer filters than a filter has elements, as its authors have it."""
    wide = {
        name: None
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.out_channels >= layer.weight[0].numel()
    }
    groups = param_groups(model, "grassmann", rules=wide, euclidean=REST)
    return SGDG(groups, lr=lr, momentum=0.9, weight_decay=decay)


def _psi(model: nn.Module, lr: float, seed: int, momentum: float, decay: float = 0.0) -> torch.optim.Optimizer:
    groups = param_groups(model, "scale_invariant", euclidean=REST)
    return PSISGD(groups, lr=lr, momentum=momentum, weight_decay=decay)


def _fg(
    model: nn.Module, lr: float, seed: int, scheme: str, manifolds: tuple[str, ...], decay: float = 0.0
) -> torch.optim.Optimizer:
    """[FG] Appendix C-B has theta_mu = theta_E = 0.9: momentum 0.9 and dampening 0.1."""
    groups = partition(model, scheme, manifolds, seed=seed, euclidean={"lr": REST["lr"]})
    return FGSGD(groups, lr=lr, momentum=0.9, dampening=0.1, weight_decay=decay)


def _orthogonality(optimizer: torch.optim.Optimizer) -> Tensor:
    """SGD-G's regulariser, a term for each layer whose filters lie on the Grassmannian."""
    groups = [group for group in optimizer.param_groups if isinstance(group["manifold"], Grassmann)]
    weights = [weight for group in groups for weight in group["params"]]
    return torch.stack([functional.orthogonality_penalty(weight.flatten(1), ALPHA) for weight in weights]).sum()


_THREE = ("sphere", "oblique", "stiefel")
_FOUR = (*_THREE, "euclidean")

#: The demo's.
METHODS: tuple[Method, ...] = (
    Method("SGD", 0.1, _sgd),
    Method("FG-SGD", 1.0, partial(_fg, scheme="pio", manifolds=_FOUR)),
    Method("PSI-SGD", 2.0, partial(_psi, momentum=0.0)),
    Method("PSI-SGDM", 0.5, partial(_psi, momentum=0.9)),
)

#: [PSI] Tables 1 and 3.
PSI: tuple[Method, ...] = (
    Method("SGD", 0.1, _sgd),
    Method("Adam", 1e-3, _adam),
    Method("SGD-G", 0.2, _sgdg),
    Method("PSI-SGD", 1.0, partial(_psi, momentum=0.0)),
    Method("PSI-SGDM", 0.1, partial(_psi, momentum=0.9)),
)

#: Adam's rate in [PSI] is for 200 epochs and too low for a few.
SWEPT: tuple[Method, ...] = (Method("Adam, swept rate", 1e-2, _adam),)

#: [FG] Tables XI-XIV, by the names used there. Of the rates 0.3, 1, 3 and 10 (``bench/paper_tables.py --sweep``) 1 was
#: best over the methods together; for none of them was another better by more than the error of the images held out.
FG: tuple[Method, ...] = (
    *(
        Method(name, 1.0, partial(_fg, scheme="individual", manifolds=(manifold,)))
        for name, manifold in (("Sp", "sphere"), ("Ob", "oblique"), ("St", "stiefel"))
    ),
    *(
        Method(f"POMs of {name}", 1.0, partial(_fg, scheme="single", manifolds=(manifold,)))
        for name, manifold in (("Sp", "sphere"), ("Ob", "oblique"), ("St", "stiefel"))
    ),
    *(
        Method(f"{scheme.upper()} ({name})", 1.0, partial(_fg, scheme=scheme, manifolds=manifolds))
        for scheme in ("pi", "po", "pio")
        for name, manifolds in (("Sp+Ob+St", _THREE), ("Sp+Ob+St+Euc.", _FOUR))
    ),
    Method("PIO (Sp+Ob+St), renormalised", 0.03, partial(_fg, scheme="pio", manifolds=_THREE), renormalised=True),
)


#: What the name of a regularised method ends in.
SUFFIX = ", regularised"


def select(methods: Sequence[Method], patterns: Sequence[str]) -> list[Method]:
    """The methods whose names match one of the shell-style patterns.

    Raises:
        ValueError: a pattern matches none.

    >>> [method.name for method in select(PSI, ["PSI*", "Adam"])]
    ['Adam', 'PSI-SGD', 'PSI-SGDM']
    """
    for pattern in patterns:
        if not any(fnmatchcase(method.name, pattern) for method in methods):
            raise ValueError(f"methods: wanted patterns of {[method.name for method in methods]}, got {pattern!r}.")
    return [method for method in methods if any(fnmatchcase(method.name, pattern) for pattern in patterns)]


def regularised(method: Method) -> Method:
    """``method`` with the regulariser of [PSI] Table 3, under a name of its own.

    An l2 term on all weights whose norm is free, and for SGD-G the orthogonality penalty on those of the Grassmannian.
    """
    return replace(
        method,
        name=method.name + SUFFIX,
        optimizer=partial(method.optimizer, decay=DECAY),
        penalty=_orthogonality if method.name == "SGD-G" else None,
    )
