"""Param groups against parameters: how a weight is seen, what a plan can hold, plans of groups put together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manifold_kernels import fit
from manifold_kernels.collection import Collection
from manifold_kernels.optim import settings
from manifold_kernels.optim.settings import ParamGroup, on_manifold
from manifold_kernels.plan import GROUP_COLUMNS, Plan
from manifold_kernels.views import Layout

#: What a parameter may be made of.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def structure_of(group: ParamGroup) -> tuple[Any, ...]:
    """What is fixed once ``group`` is in an optimizer."""
    return tuple(group.get(name) for name in settings.STRUCTURE)


def layout_of(group: ParamGroup, parameter: Tensor) -> Layout:
    """How ``parameter`` becomes matrices in ``group``."""
    if not on_manifold(group):
        return Layout("flat")
    of = group["manifold"]
    default = of.default_view(parameter) if isinstance(of, Collection) else fit.default_view(of, parameter)
    view = group["view"] or default
    return Layout(view, int(group["transposed"]), group["channel_groups"], group["rows"])


def check_parameter(parameter: Tensor, device: torch.device) -> None:
    """Raise ``ValueError`` unless backends can step ``parameter`` in one call with others on ``device``."""
    if parameter.dtype not in DTYPES:
        raise ValueError(f"dtype: wanted one of {list(DTYPES)}, got {parameter.dtype}.")
    if parameter.layout is not torch.strided:
        raise ValueError(f"layout: wanted a dense (strided) parameter, got {parameter.layout}.")
    if parameter.device != device:
        raise ValueError(
            f"device: wanted {device}, where the optimizer's first parameter is, got {parameter.device}. "
            "Use one optimizer for each device."
        )
    if any(size > 1 and stride == 0 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
        raise ValueError("strides: wanted an element of memory for every weight, got an expanded tensor. Clone it.")


def refuse_shared(params: list[Any], groups: list[ParamGroup]) -> None:
    """Raise ``ValueError`` for one of ``params``, of a new group, that is in it twice or in another."""
    owner = {id(p): f"param group {index}" for index, group in enumerate(groups) for p in group["params"]}
    for position, item in enumerate(params):
        parameter = item[1] if isinstance(item, tuple) else item
        if id(parameter) in owner:
            raise ValueError(
                f"params: parameter {position} of the new group, of shape {tuple(parameter.shape)}, is in "
                f"{owner[id(parameter)]} already. Leave it out of one: a parameter takes one step."
            )
        owner[id(parameter)] = "the same group"


def joined(one: Plan, other: Plan) -> Plan:
    """Both plans in one; their numbers of parameters and hyper rows are those of the whole optimizer already."""
    groups = other.groups.clone()
    groups[:, GROUP_COLUMNS.index("first")] += other.column("listed") * one.components.numel()
    groups[:, GROUP_COLUMNS.index("scale")] += one.scales.numel()
    return Plan(
        torch.cat([one.groups, groups]),
        torch.cat([one.components, other.components]),
        torch.cat([one.scales, other.scales]),
    )
