"""The operator: tables refreshed, kernels launched, one after the other on the current stream."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from manifold_kernels.plan import Plan
from manifold_kernels.triton import library
from manifold_kernels.triton.arguments import check_arguments
from manifold_kernels.triton.planning import INTERPRETED, RETRACTION_NAMES, Launch, Member, Schedule, schedule
from manifold_kernels.triton.tables import HYPER_COLUMNS

#: Options of every compilation: what is fused is written as fma, so that a new compiler does not change results.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}

if INTERPRETED:
    from manifold_kernels.triton import interpreter

    interpreter.teach()

_SCHEDULES: OrderedDict[Hashable, tuple[Schedule, tuple[Tensor, ...]]] = OrderedDict()
_RESIDENT: OrderedDict[Hashable, tuple[Tensor, Tensor]] = OrderedDict()
_KEPT = 16


class Amp(NamedTuple):
    """What a gradient scaler says, numbers on the parameters' device that nobody waits for."""

    scale: Tensor
    skips: Tensor

    @staticmethod
    def of(grad_scale: Tensor | None, found_inf: Tensor | None) -> Amp | None:
        given = next((tensor for tensor in (grad_scale, found_inf) if tensor is not None), None)
        if given is None:
            return None
        for name, tensor in (("grad_scale", grad_scale), ("found_inf", found_inf)):
            if tensor is not None and (tensor.dtype != torch.float32 or tensor.numel() != 1):
                raise ValueError(f"{name}: wanted one float32 number, got {tensor.dtype} {tuple(tensor.shape)}.")
        scale = torch.ones_like(given) if grad_scale is None else grad_scale
        return Amp(scale.reshape(()), (torch.zeros_like(given) if found_inf is None else found_inf).reshape(()) != 0)


def step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momenta: Sequence[Tensor],
    variances: Sequence[Tensor],
    steps: Tensor,
    nonfinite: Tensor,
    groups: Tensor,
    components: Tensor,
    scales: Tensor,
    hyper: Tensor,
    norms: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    live: Tensor | None = None,
    /,
) -> None:
    """One step of everything that the plan ``(groups, components, scales)`` covers; ``ops.py`` has the arguments."""
    plan, amp = Plan(groups, components, scales), Amp.of(grad_scale, found_inf)
    if params:
        _run(params, grads, momenta, variances, steps, nonfinite, plan, hyper, live, norms, amp, False)
    taken = _resident(torch.tensor([grad is not None for grad in grads], dtype=torch.bool), steps.device)
    steps += taken if amp is None else taken & ~amp.skips


def warm_up(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momenta: Sequence[Tensor],
    variances: Sequence[Tensor],
    steps: Tensor,
    nonfinite: Tensor,
    groups: Tensor,
    components: Tensor,
    scales: Tensor,
    hyper: Tensor,
    norms: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    live: Tensor | None = None,
    /,
) -> None:
    """Compile what a step with these arguments needs, without taking it."""
    plan, amp = Plan(groups, components, scales), Amp.of(grad_scale, found_inf)
    if params:
        _run(params, grads, momenta, variances, steps, nonfinite, plan, hyper, live, norms, amp, True)


def _run(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momenta: Sequence[Tensor],
    variances: Sequence[Tensor],
    steps: Tensor,
    nonfinite: Tensor,
    plan: Plan,
    hyper: Tensor,
    live: Tensor | None,
    norms: Tensor | None,
    amp: Amp | None,
    only_compile: bool,
) -> None:
    device = params[0].device
    # A lazy view has its sign in a flag, which kernels do not see.
    grads = [None if grad is None else grad.resolve_neg() for grad in grads]
    what = _schedule(
        params, grads, momenta, variances, steps, nonfinite, plan, hyper, norms is not None, amp is not None
    )
    addresses = _addresses(params, grads, momenta, variances, steps)
    counts = nonfinite if nonfinite.device == device else torch.zeros_like(nonfinite, device=device)
    measured = None
    if norms is not None:
        measured = torch.full(norms.shape, float("nan"), dtype=torch.float64, device=device)
    numbers = _table(hyper if live is None else live, amp, device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        arguments = (
            _resident(addresses, device),
            what.axes,
            what.groups,
            what.components,
            _resident(plan.scales, device, by_content=False),
            numbers,
            what.partials,
            what.totals,
            measured if measured is not None else what.totals,
            counts,
        )
        for launch in what.launches:
            _launch(launch, what, arguments, only_compile)
    if only_compile:
        return
    for member in what.library:
        _by_library(member, plan, numbers, grads, params, momenta, steps, counts, measured)
    if counts is not nonfinite:
        nonfinite += counts.to(nonfinite.device)
    if norms is not None and measured is not None:
        norms.copy_(measured)


def _by_library(
    planned: Member,
    plan: Plan,
    numbers: Tensor,
    grads: Sequence[Tensor | None],
    params: Sequence[Tensor],
    momenta: Sequence[Tensor],
    steps: Tensor,
    counts: Tensor,
    norms: Tensor | None,
) -> None:
    at, parameter = planned.at, planned.at["parameter"]
    grad, weight = grads[parameter], params[parameter]
    assert grad is not None  # else it is not in the schedule
    # The schedule outlives the tensors that it was made from.
    of = replace(planned, weight=weight, grad=grad, momentum=momenta[parameter] if planned.buffered else weight)
    size = at["count"] if of.individual else 1
    library.step(
        of,
        dict(zip(HYPER_COLUMNS, numbers[at["hyper"]].unbind(), strict=True)),
        plan.members(of.row).to(weight.device),
        plan.scale(of.row),
        RETRACTION_NAMES[at["retraction"]],
        steps[parameter].to(weight.device) == 0,
        counts,
        None if norms is None else norms[of.first_norm : of.first_norm + size],
    )


def _launch(launch: Launch, what: Schedule, arguments: tuple[Tensor, ...], only_compile: bool) -> None:
    kernel, constants = launch.kernel.function, dict(launch.kernel.constants)
    given = (what.groups, what.partials, what.totals, launch.tiles) if launch.sums else (launch.tiles, *arguments)
    options = {} if INTERPRETED else {**OPTIONS, "num_warps": launch.kernel.warps}
    if only_compile:
        kernel.warmup(*given, **constants, **options, grid=(launch.programs,))
    else:
        with np.errstate(all="ignore") if INTERPRETED else nullcontext():
            kernel[(launch.programs,)](*given, **constants, **options)


def _addresses(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momenta: Sequence[Tensor],
    variances: Sequence[Tensor],
    steps: Tensor,
) -> Tensor:
    rows = [
        (param.data_ptr(), 0 if grad is None else grad.data_ptr(), momentum.data_ptr(), variance.data_ptr(), taken)
        for param, grad, momentum, variance, taken in zip(
            params, grads, momenta, variances, _element_addresses(steps), strict=True
        )
    ]
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _resident(table: Tensor, device: torch.device, by_content: bool = True) -> Tensor:
    """``table`` on ``device``, copied when it changes: a captured graph replays what it reads, and no copy from a host.

    Told apart by what it holds, or (not ``by_content``) as a tensor that may be written to.
    """
    if table.device == device:
        return table
    known = table.numpy().tobytes() if by_content else (id(table), table._version)
    key = (device, table.dtype, known)
    if key not in _RESIDENT:
        # The table is kept with its copy, so that no other tensor can come by its identity.
        source = table.pin_memory() if device.type == "cuda" else table
        _RESIDENT[key] = source.to(device, non_blocking=True), table
        if len(_RESIDENT) > 4 * _KEPT:
            _RESIDENT.popitem(last=False)
    _RESIDENT.move_to_end(key)
    return _RESIDENT[key][0]


def _element_addresses(tensor: Tensor) -> range:
    size = tensor.element_size()
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * size, size)


def _table(hyper: Tensor, amp: Amp | None, device: torch.device) -> Tensor:
    """The table of hyper-parameters as kernels read it (``tables.HYPER_COLUMNS``), on ``device``."""
    sign = 1 - 2 * hyper[:, HYPER_COLUMNS.index("maximize"), None]
    table = _resident(torch.cat([hyper, sign, torch.zeros_like(sign)], 1), device)
    if amp is None:
        return table
    return torch.cat([table[:, :-2], table[:, -2:-1] * amp.scale, amp.skips.to(table.dtype).expand_as(sign)], 1)


def _schedule(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momenta: Sequence[Tensor],
    variances: Sequence[Tensor],
    steps: Tensor,
    nonfinite: Tensor,
    plan: Plan,
    hyper: Tensor,
    norms: bool,
    amp: bool,
) -> Schedule:
    """The launches, from the last time that plan, options and memory were the same, or checked and made now."""
    lists = [params, grads, momenta, variances, (steps, nonfinite, plan.scales, hyper)]
    key = (
        (id(plan.groups), plan.groups._version, id(plan.components), plan.components._version, norms, amp),
        tuple((row[1] != 0, row[3] != 0, row[4] != 0, row[5] != 0) for row in hyper.tolist()),
        tuple(tuple(None if tensor is None else _seen(tensor) for tensor in some) for some in lists),
    )
    if key in _SCHEDULES:
        _SCHEDULES.move_to_end(key)
    else:
        check_arguments(params, grads, momenta, variances, steps, nonfinite, plan, hyper)
        made = schedule(plan, params, grads, momenta, hyper, norms, amp)
        # The plan's tensors are kept with it, so that no other tensor can come by their identity.
        _SCHEDULES[key] = made, (plan.groups, plan.components)
        if len(_SCHEDULES) > _KEPT:
            _SCHEDULES.popitem(last=False)
    return _SCHEDULES[key][0]


def forget() -> None:
    """Plan the next step anew."""
    _SCHEDULES.clear()
    _RESIDENT.clear()


def _seen(tensor: Tensor) -> Hashable:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.data_ptr() % 16
