"""Steps as pure functions, in the style of ``torch.func``: weights, gradients and states in, weights and states out.

>>> from torch import nn
>>> from torch.func import functional_call, grad
>>> from manifold_kernels import FGSGD, param_groups
>>> model = nn.Sequential(nn.Conv2d(2, 4, 3))
>>> optimizer = FGSGD(param_groups(model, "stiefel"), lr=0.1, momentum=0.9)
>>> params, state = initial(optimizer)
>>> x = torch.randn(8, 2, 5, 5)
>>> gradient = grad(lambda params: functional_call(model, params, x).square().mean())
>>> for _ in range(3):
...     params, state = step(optimizer, params, gradient(params), state)
>>> state.steps.tolist()
[3, 3]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from manifold_kernels.optim import checkpoint, operands, settings
from manifold_kernels.optim.base import ManifoldOptimizer


class State(NamedTuple):
    """What a step carries to the next: buffers by the parameters' names, and counts as the operator has them."""

    momenta: dict[str, Tensor]
    variances: dict[str, Tensor]
    steps: Tensor
    nonfinite: Tensor


def initial(optimizer: ManifoldOptimizer) -> tuple[dict[str, Tensor], State]:
    """Copies of the weights of ``optimizer`` by name, and the state before the first step.

    Raises:
        ValueError: for sharded parameters and optimizers with masters, whose weights are not what steps.
    """
    parameters = optimizer._all_parameters()
    if any(map(operands.is_sharded, parameters)) or optimizer._master_weights:
        raise ValueError("optimizer: wanted plain parameters without master weights, got shards or masters.")
    counts = checkpoint.component_counts(optimizer.plan, len(parameters))
    buffers: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    weights: dict[str, Tensor] = {}
    held = [optimizer._buffers(group) for group in optimizer.param_groups for _ in group["params"]]
    for name, parameter, names, count in zip(optimizer.parameter_names(), parameters, held, counts, strict=True):
        weights[name] = _copy(parameter)
        for kind, into in zip(names, buffers, strict=True):
            into[name] = parameter.new_empty(0) if kind is None else checkpoint.new_buffer(kind, parameter, count)
    zeros = torch.zeros(len(parameters), dtype=torch.int64, device=parameters[0].device if parameters else "cpu")
    return weights, State(*buffers, zeros, zeros.clone())


def step(
    optimizer: ManifoldOptimizer, params: Mapping[str, Tensor], grads: Mapping[str, Tensor], state: State
) -> tuple[dict[str, Tensor], State]:
    """One step with the plan and the settings of ``optimizer``, which gives both and stays as it is.

    Args:
        optimizer: whose ``param_groups`` may change between calls, learning rates for example.
        params: weights by the optimizer's ``parameter_names()``, of the shapes, types and strides
            of its parameters.
        grads: gradients by name; a name that is missing is not stepped.
        state: from :func:`initial` or the last step.

    Returns:
        new weights and a new state. Nothing that came in was written to.
    """
    weights = {name: _copy(params[name]) for name in optimizer.parameter_names()}
    momenta, variances = ({name: _copy(own[name]) for name in weights} for own in (state.momenta, state.variances))
    steps, nonfinite = state.steps.clone(), state.nonfinite.clone()
    for index, group in enumerate(optimizer.param_groups):
        optimizer._check_group(index, group)
    rows = [optimizer._hyper_row(group) for group in optimizer.param_groups]
    plan, (hyper, live) = optimizer.plan, settings.tables(rows, steps.device)
    with torch.no_grad():
        optimizer._operator(
            list(weights.values()),
            [grads[name].detach() if name in grads else None for name in weights],
            list(momenta.values()),
            list(variances.values()),
            steps,
            nonfinite,
            plan.groups,
            plan.components,
            plan.scales,
            hyper,
            None,
            None,
            None,
            live,
        )
    return weights, State(momenta, variances, steps, nonfinite)


def _copy(tensor: Tensor) -> Tensor:
    return operands.like(tensor, tensor.dtype).copy_(tensor.detach())
