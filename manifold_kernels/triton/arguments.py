"""What a step is called with, looked at before anything is read through it or written: kernels look at nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manifold_kernels import views
from manifold_kernels.manifolds import Euclidean
from manifold_kernels.plan import GROUP_COLUMNS, HYPER_COLUMNS, RULES, Plan

_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_arguments(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momenta: Sequence[Tensor],
    variances: Sequence[Tensor],
    steps: Tensor,
    nonfinite: Tensor,
    plan: Plan,
    hyper: Tensor,
) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless a step stays within these tensors; ``ops.py`` says what they are."""
    if not len(params) == len(grads) == len(momenta) == len(variances):
        raise ValueError(
            f"grads, momenta, variances: wanted lists as long as params ({len(params)}), got {len(grads)}, "
            f"{len(momenta)}, {len(variances)}."
        )
    for name, counts in (("steps", steps), ("nonfinite", nonfinite)):
        if counts.dtype != torch.int64 or counts.shape != (len(params),) or not counts.is_contiguous():
            raise ValueError(
                f"{name}: wanted {len(params)} contiguous int64, got {counts.dtype} {tuple(counts.shape)}."
            )
    if hyper.dtype != torch.float64 or hyper.dim() != 2 or hyper.shape[1] != len(HYPER_COLUMNS):
        raise ValueError(f"hyper: wanted float64 (*, {len(HYPER_COLUMNS)}), got {hyper.dtype} {tuple(hyper.shape)}.")
    device = params[0].device
    if steps.device != device:
        raise ValueError(f"steps: wanted {device}, where the parameters are, got {steps.device}.")
    for index, (param, grad, momentum) in enumerate(zip(params, grads, momenta, strict=True)):
        if param.dtype not in _TYPES:
            raise TypeError(f"params[{index}]: wanted float32, float64, bfloat16 or float16, got {param.dtype}.")
        if param.device != device:
            raise ValueError(f"params[{index}]: wanted all on {device}, got {param.device}.")
        _check_like(f"grads[{index}]", grad, param)
        _check_like(f"momenta[{index}]", momentum if momentum.numel() else None, param)
        if momentum.numel() and momentum.stride() != param.stride():
            raise ValueError(
                f"momenta[{index}]: wanted the strides of the weight, {param.stride()}, got {momentum.stride()}."
            )
    plan.check(params)
    for row, values in enumerate(plan.groups.tolist()):
        at = dict(zip(GROUP_COLUMNS, values, strict=True))
        if at["hyper"] >= len(hyper):
            raise ValueError(f"plan: group {row} has hyper {at['hyper']}, wanted 0 to {len(hyper) - 1}.")
        index, adaptive = at["parameter"], at["rule"] == RULES["adam_g"] and at["manifold"] != Euclidean.code
        param, moving = params[index], bool(hyper[at["hyper"], HYPER_COLUMNS.index("momentum")] != 0)
        if grads[index] is None or param.numel() == 0:
            continue
        if (moving or adaptive) and momenta[index].numel() == 0:
            raise ValueError(f"momenta[{index}]: wanted a buffer like the weight, got an empty tensor.")
        if adaptive:
            _check_variance(f"variances[{index}]", variances[index], param, plan.layout(row))


def _check_like(name: str, tensor: Tensor | None, param: Tensor) -> None:
    if tensor is None or (tensor.shape, tensor.dtype, tensor.device) == (param.shape, param.dtype, param.device):
        return
    raise ValueError(
        f"{name}: wanted {param.dtype} {tuple(param.shape)} on {param.device}, as the weight, got {tensor.dtype} "
        f"{tuple(tensor.shape)} on {tensor.device}."
    )


def _check_variance(name: str, variance: Tensor, param: Tensor, layout: views.Layout) -> None:
    count, dtype = views.shape_of(param, layout).count, torch.promote_types(param.dtype, torch.float32)
    if (variance.shape, variance.dtype, variance.device) != ((count,), dtype, param.device) or (
        not variance.is_contiguous()
    ):
        raise ValueError(
            f"{name}: wanted contiguous {dtype} ({count},) on {param.device}, one number a component, got "
            f"{variance.dtype} {tuple(variance.shape)} on {variance.device}."
        )
