"""PSI-SGD and PSI-SGDM: [PSI] Algorithm 1."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from manifold_kernels.manifolds import Manifold, ScaleInvariant
from manifold_kernels.optim.base import ManifoldOptimizer


class PSISGD(ManifoldOptimizer):
    """SGD on the quotient of scale-invariant weights, with or without momentum, [PSI] Eq. 9-11.

    For every vector ``w`` (a filter, or ``rows`` of them) of a group on ``ScaleInvariant``, with gradient ``g``::

        u <- momentum u - lr ||w||^2 g                            Eq. 11; u = 0 before the first step
        w <- (1 - k) w + u,    k = min(lr weight_decay ||w||^2, 1/2)
        w, u <- w/||w||, u/||w||    where ||w|| > guard           section 6.2, applied to both

    so that training from ``a w`` is the same for every ``a > 0``. Groups without a manifold (norm parameters, biases,
    the last layer) take the step of ``torch.optim.SGD``; their learning rate, eta_g of Algorithm 1, is their
    group's.

    Args:
        params: parameters or param groups; see :class:`ManifoldOptimizer` for what a group may set.
        lr: learning rate, >= 0. [PSI] uses 1.0 without and 0.1 with momentum.
        momentum: rho of Eq. 11.
        weight_decay: lambda; on scale-invariant vectors it is decoupled from the momentum and bounded.
        maximize: steps uphill.
        guard: the norm above which ``w`` and ``u`` are divided by it; ``math.inf``: never.
        manifold: ``ScaleInvariant()``, its name, or ``None``.
        master_weights: step bfloat16 and float16 parameters through float32 masters, whose roundings they become.
        nonfinite: ``"skip"`` leaves vectors without a finite gradient or momentum as they are and counts them
            (:meth:`nonfinite_count`); ``"raise"`` raises ``ValueError`` before anything is written.
        cut_matrices: ``"raise"`` raises ``ValueError`` for vectors that a sharding cuts, ``"gather"`` steps them whole
            on every rank.
        backend: ``"auto"`` or a name in :func:`manifold_kernels.ops.backends`.

    >>> import torch
    >>> weight, bias = torch.nn.Parameter(torch.tensor([[2.0, 0.0]])), torch.nn.Parameter(torch.zeros(1))
    >>> groups = [{"params": [weight], "manifold": "scale_invariant"}, {"params": [bias], "lr": 0.01}]
    >>> optimizer = PSISGD(groups, lr=0.25, backend="reference")
    >>> weight.grad, bias.grad = torch.tensor([[0.0, 1.0]]), torch.ones(1)
    >>> optimizer.step()
    >>> weight.tolist()  # 0 - 0.25 * 2^2 * 1
    [[2.0, -1.0]]
    """

    rule = "psi_sgd"
    accepts = (ScaleInvariant,)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        guard: float = 1e4,
        manifold: Manifold | str | None = None,
        master_weights: bool = False,
        nonfinite: str = "skip",
        cut_matrices: str = "raise",
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "guard": guard,
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
