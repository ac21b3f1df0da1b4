"""Averages of weights (SWA, EMA) back on their manifolds: a mean of points of a manifold is not on it."""

from __future__ import annotations

import torch
from torch import nn

from manifold_kernels.optim import constraint, gathering
from manifold_kernels.optim.base import ManifoldOptimizer
from manifold_kernels.optim.operands import is_sharded


@torch.no_grad()
def project_average_(average: nn.Module, optimizer: ManifoldOptimizer) -> None:
    """Move the weights of ``average`` to the nearest points of the manifolds that ``optimizer`` has for their names.

    The nearest point to a mean of points is their extrinsic (chordal) mean: ``s x/||x||`` on the sphere and for each
    column on the oblique manifold, ``s polar(x)`` on Stiefel. Computed in float64 and rounded once. Call it before
    ``update_bn`` and before the average is evaluated.

    Args:
        average: a ``torch.optim.swa_utils.AveragedModel`` of the model, or a model with its parameters' names.
        optimizer: the optimizer of the model, made from named parameters (``param_groups`` names them).

    Raises:
        ValueError: a parameter of ``optimizer`` without a name in ``average``, of another shape, or in shards where the
            other is not.

    >>> from torch.optim.swa_utils import AveragedModel
    >>> from manifold_kernels import FGSGD, param_groups
    >>> model = nn.Sequential(nn.Conv2d(2, 4, 3))
    >>> optimizer = FGSGD(param_groups(model, "stiefel"), lr=0.1)
    >>> average = AveragedModel(model)
    >>> average.module[0].weight.data.mul_(0.5)[0, 0, 0, 0].isfinite().item()
    True
    >>> project_average_(average, optimizer)
    >>> torch.allclose(average.module[0].weight, model[0].weight, atol=1e-6)
    True
    """
    module = average.module if isinstance(average, torch.optim.swa_utils.AveragedModel) else average
    found = dict(module.named_parameters(remove_duplicate=False))
    named = list(zip(optimizer.parameter_names(), optimizer._all_parameters(), strict=True))
    for name, parameter in named:
        if name not in found or found[name].shape != parameter.shape:
            got = "none" if name not in found else tuple(found[name].shape)
            raise ValueError(f"average: wanted a parameter {name} of shape {tuple(parameter.shape)}, got {got}.")
        if is_sharded(found[name]) != is_sharded(parameter):
            raise ValueError(
                f"average: wanted {name} in shards as the optimizer has it, or whole as there. Shard both."
            )
    gathered = optimizer._gathered()
    for position, (name, _) in enumerate(named):
        with gathering.opened(found[name], position in gathered) as weight:
            constraint.place_(optimizer.plan, position, weight)
