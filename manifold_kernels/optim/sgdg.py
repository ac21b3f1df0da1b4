"""SGD-G: Cho & Lee, "Riemannian approach to batch normalization" (2017)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from manifold_kernels.manifolds import Grassmann, Manifold
from manifold_kernels.optim.base import ManifoldOptimizer


class SGDG(ManifoldOptimizer):
    """SGD with momentum on the Grassmann manifold G(1, n) (Cho & Lee 2017, Algorithm 4).

    For every vector ``w`` (a filter) of a group on ``Grassmann``, with gradient ``g``::

        h   =  g - <w, g> w,    h <- h min(1, clip/||h||)
        d   =  momentum tau - lr h                                    tau = 0 before the first step
        w'  =  w cos||d|| + d/||d|| sin||d||
        tau <- d cos||d|| - w ||d|| sin||d||                          without its component along w'

    ``w'`` is normalised. Groups without a manifold take the step of ``torch.optim.SGD``; the authors use Nesterov
    momentum there, lr 0.01 and weight decay 5e-4.

    Args:
        params: parameters or param groups; see :class:`ManifoldOptimizer` for what a group may set.
        lr: learning rate, >= 0.
        momentum: rho.
        dampening: for Euclidean groups only, as in torch.
        weight_decay: for Euclidean groups only.
        nesterov: for Euclidean groups only.
        clip: nu, the longest Riemannian gradient; ``math.inf``: none is clipped.
        maximize: steps uphill.
        manifold: ``Grassmann()``, its name, or ``None``.
        master_weights: step bfloat16 and float16 parameters through float32 masters, whose roundings they become.
        nonfinite: ``"skip"`` leaves vectors without a finite gradient or momentum as they are and counts them
            (:meth:`nonfinite_count`); ``"raise"`` raises ``ValueError`` before anything is written.
        cut_matrices: ``"raise"`` raises ``ValueError`` for vectors that a sharding cuts, ``"gather"`` steps them whole
            on every rank.
        backend: ``"auto"`` or a name in :func:`manifold_kernels.ops.backends`.

    >>> import math, torch
    >>> weight = torch.nn.Parameter(torch.tensor([[1.0, 0.0]]))
    >>> optimizer = SGDG([weight], lr=math.pi / 2, clip=1.0, manifold="grassmann", backend="reference")
    >>> weight.grad = torch.tensor([[5.0, -3.0]])  # h = (0, -3), clipped to (0, -1): a quarter turn
    >>> optimizer.step()
    >>> [round(x, 6) for x in weight[0].tolist()]
    [0.0, 1.0]
    """

    rule = "sgd_g"
    accepts = (Grassmann,)
    euclidean_only: ClassVar[Mapping[str, object]] = {"weight_decay": 0.0, "dampening": 0.0, "nesterov": False}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.2,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        clip: float = 0.1,
        maximize: bool = False,
        manifold: Manifold | str | None = None,
        master_weights: bool = False,
        nonfinite: str = "skip",
        cut_matrices: str = "raise",
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "clip": clip,
            "maximize": maximize,
            "manifold": manifold,
            **self.manifold_only,
        }
        super().__init__(
            params,
            defaults,
            master_weights=master_weights,
            nonfinite=nonfinite,
            cut_matrices=cut_matrices,
            backend=backend,
        )
