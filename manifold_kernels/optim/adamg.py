"""Adam-G: Cho & Lee, "Riemannian approach to batch normalization" (2017)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from manifold_kernels.manifolds import Grassmann, Manifold
from manifold_kernels.optim.base import ManifoldOptimizer
from manifold_kernels.optim.settings import ParamGroup, on_manifold
from manifold_kernels.plan import HYPER_COLUMNS


class AdamG(ManifoldOptimizer):
    """Adam on the Grassmann manifold G(1, n), with one second moment a vector (Cho & Lee 2017, Algorithm 5).

    For every vector ``w`` (a filter) of a group on ``Grassmann``, with gradient ``g``, at step t = 1, 2, ...::

        h   =  g - <w, g> w,    h <- h min(1, clip/||h||)
        m   =  beta1 tau + (1 - beta1) h
        v   <- beta2 v + (1 - beta2) ||h||^2
        d   =  -lr sqrt(1 - beta2^t)/(1 - beta1^t) m/sqrt(v + eps),    u = d/||d||
        w'  =  w cos||d|| + u sin||d||
        tau <- m - <u, m> (w sin||d|| + (1 - cos||d||) u)             without its component along w'

    ``w'`` is normalised. Groups without a manifold take the step of ``torch.optim.SGD`` with their ``momentum``,
    ``dampening``, ``weight_decay`` and ``nesterov``; the authors use Nesterov momentum 0.9, lr 0.01, weight decay 5e-4.
    ``state[p]`` has tau in ``exp_avg`` and v in ``exp_avg_sq`` (float32, float64 for float64).

    Args:
        params: parameters or param groups; see :class:`ManifoldOptimizer` for what a group may set.
        lr: learning rate, >= 0.
        betas: beta1 and beta2, in [0, 1).
        eps: added to v, > 0.
        clip: nu, the longest Riemannian gradient; ``math.inf``: none is clipped.
        momentum: for Euclidean groups only, as the next three.
        dampening: as in torch.
        weight_decay: as in torch.
        nesterov: as in torch.
        maximize: steps uphill.
        manifold: ``Grassmann()``, its name, or ``None``.
        master_weights: step bfloat16 and float16 parameters through float32 masters, whose roundings they become.
        nonfinite: ``"skip"`` leaves vectors without a finite gradient or momentum as they are and counts them
            (:meth:`nonfinite_count`); ``"raise"`` raises ``ValueError`` before anything is written.
        cut_matrices: ``"raise"`` raises ``ValueError`` for vectors that a sharding cuts, ``"gather"`` steps them whole
            on every rank.
        backend: ``"auto"`` or a name in :func:`manifold_kernels.ops.backends`.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.tensor([[1.0, 0.0]]))
    >>> optimizer = AdamG([weight], lr=0.05, manifold="grassmann", backend="reference")
    >>> weight.grad = torch.tensor([[5.0, -3.0]])
    >>> optimizer.step()  # the first step of Adam is one of length lr
    >>> round(torch.atan2(weight[0, 1], weight[0, 0]).item(), 5)
    0.05
    """

    rule = "adam_g"
    accepts = (Grassmann,)
    euclidean_only: ClassVar[Mapping[str, object]] = {
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": False,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.05,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        clip: float = 0.1,
        *,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        manifold: Manifold | str | None = None,
        master_weights: bool = False,
        nonfinite: str = "skip",
        cut_matrices: str = "raise",
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "clip": clip,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
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

    def _buffers(self, group: ParamGroup) -> tuple[str | None, str | None]:
        return ("exp_avg", "exp_avg_sq") if on_manifold(group) else super()._buffers(group)

    def _hyper_row(self, group: ParamGroup) -> list[float | Tensor]:
        row = super()._hyper_row(group)
        if on_manifold(group):
            row[HYPER_COLUMNS.index("momentum")], row[HYPER_COLUMNS.index("beta2")] = group["betas"]
        return row
