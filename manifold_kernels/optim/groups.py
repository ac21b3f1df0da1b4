"""Param groups against parameters: how a weight is seen, what a plan can hold, plans of groups put together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

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
    if _overlaps(parameter):
        raise ValueError(
            f"strides: wanted an element of memory for every weight, got shape {tuple(parameter.shape)} with strides "
            f"{parameter.stride()}, an expanded or overlapping tensor. Clone it."
        )


def _overlaps(parameter: Tensor) -> bool:
    """Whether two elements of ``parameter`` lie at the same place."""
    dims = sorted((stride, size) for size, stride in zip(parameter.shape, parameter.stride(), strict=True) if size > 1)
    reach = 0  # the last place of the dimensions so far
    for stride, size in dims:
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    places = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in dims:
        places = torch.unique(places[:, None] + stride * torch.arange(size, device="cpu"))
    return places.numel() < parameter.numel()


def check_new(params: list[Any], groups: list[ParamGroup]) -> None:
    """Raise ``ValueError`` for one of ``params``, of a new group, that is lazy, in it twice, or in another."""
    owner = {id(p): f"param group {index}" for index, group in enumerate(groups) for p in group["params"]}
    for position, item in enumerate(params):
        parameter = item[1] if isinstance(item, tuple) else item
        if is_lazy(parameter):
            raise ValueError(
                f"params: wanted initialised parameters, got a lazy one at {position} of the new group. Call the model "
                "on a batch first."
            )
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
