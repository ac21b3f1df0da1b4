"""The driver: reads each group's components, moves them by their rule, writes what changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from manifold_kernels import views
from manifold_kernels.manifolds import RETRACTIONS, Euclidean
from manifold_kernels.plan import GROUP_COLUMNS, HYPER_COLUMNS, STEP_SIZES, Plan
from manifold_kernels.plan import RULES as RULE_CODES
from manifold_kernels.reference.registry import GEOMETRIES
from manifold_kernels.reference.rules import (
    RULES,
    Components,
    Hyper,
    Moved,
    Rule,
    all_finite,
    euclidean_fg_sgd,
    euclidean_sgd,
)
from manifold_kernels.views import Layout

_RETRACTION_NAMES = {code: name for name, code in RETRACTIONS.items()}


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
) -> None:
    """One step of everything that the plan ``(groups, components, scales)`` covers; see ``ops.py`` for the arguments.

    Any floating-point type, device and strides. Euclidean groups without a bound on the step size are computed in
    float32 (float64 for float64), bit for bit as ``torch.optim.SGD(foreach=False, fused=False)``; elsewhere the
    momentum is, and the rest is computed in float64 and rounded once.

    Raises:
        ValueError: where a buffer that a group needs has not the shape of its weight, or ``norms`` not the plan's.
    """
    plan = Plan(groups, components, scales)
    counts = torch.where(plan.column("individual") == 1, plan.column("count"), 1).tolist()
    if norms is not None:
        _check_norms(norms, sum(counts))
        norms.fill_(math.nan)
    _check_number("grad_scale", grad_scale)
    _check_number("found_inf", found_inf)
    if found_inf is not None and found_inf.item() != 0:
        return
    each_norm = [None] * len(counts) if norms is None else torch.split(norms, counts)
    with torch.no_grad():
        for row, values in enumerate(groups.tolist()):
            at = dict(zip(GROUP_COLUMNS, values, strict=True))
            index = at["parameter"]
            grad = grads[index]
            if grad is None or grad.numel() == 0 or at["count"] == 0:
                continue
            h = Hyper(*(hyper if live is None else live)[at["hyper"]].tolist())
            nonfinite[index] += _step_group(
                plan,
                row,
                at,
                h,
                bool(hyper[at["hyper"], HYPER_COLUMNS.index("momentum")] != 0),
                params[index],
                grad,
                momenta[index],
                variances[index],
                int(steps[index]),
                each_norm[row],
                None if grad_scale is None else grad_scale.item(),
            )
        steps += torch.tensor([grad is not None for grad in grads], dtype=steps.dtype, device=steps.device)


def _check_norms(norms: Tensor, size: int) -> None:
    if norms.dtype != torch.float64 or norms.device.type != "cpu" or norms.shape != (size,):
        raise ValueError(
            f"norms: wanted float64 ({size},) on the CPU, a number for every group and one for each component of an "
            f"individual one, got {norms.dtype} {tuple(norms.shape)} on {norms.device}."
        )


def _check_number(name: str, tensor: Tensor | None) -> None:
    if tensor is not None and (tensor.dtype != torch.float32 or tensor.numel() != 1):
        raise ValueError(f"{name}: wanted one float32 number, got {tensor.dtype} {tuple(tensor.shape)}.")


def _unscaled(grad: Tensor, scale: float | None) -> Tensor:
    """``grad`` divided by ``scale`` in the arithmetic of the step."""
    return grad if scale is None else grad.to(torch.promote_types(grad.dtype, torch.float32)) / scale


def _step_group(
    plan: Plan,
    row: int,
    at: dict[str, int],
    h: Hyper,
    has_momentum: bool,
    param: Tensor,
    grad: Tensor,
    momentum: Tensor,
    variance: Tensor,
    steps: int,
    norms: Tensor | None,
    grad_scale: float | None,
) -> int:
    """Step the components of one group and write R; returns how many were left as they were."""
    euclidean = at["manifold"] == Euclidean.code
    adaptive = at["rule"] == RULE_CODES["adam_g"] and not euclidean
    buffered = adaptive or has_momentum
    if buffered and momentum.shape != param.shape:
        raise ValueError(
            f"momenta: wanted shape {tuple(param.shape)} for parameter {at['parameter']}, got {tuple(momentum.shape)}. "
            "Only parameters without momentum have an empty buffer."
        )
    layout, members = plan.layout(row), plan.members(row).to(param.device)
    geometry = GEOMETRIES[at["manifold"]]
    x = Components(
        w=_read(param, layout, members),
        g=_unscaled(_read(grad, layout, members), grad_scale),
        m=_read(momentum, layout, members) if buffered else None,
        v=variance[members].reshape(-1, 1, 1) if adaptive else None,
        s=plan.scale(row).to(param.device).reshape(-1, 1, 1).expand(members.numel(), 1, 1),
        steps=steps,
        geometry=geometry,
        retraction=geometry.retractions[_RETRACTION_NAMES[at["retraction"]]],
        individual=bool(at["individual"]),
        bounded=at["step_size"] == STEP_SIZES["general"],
    )
    bounded = x.bounded and at["rule"] == RULE_CODES["fg_sgd"]
    if euclidean and not bounded:
        kept, moved = torch.arange(members.numel(), device=members.device), euclidean_sgd(x, h)
    else:
        kept, moved = _move_finite(x, euclidean_fg_sgd if euclidean else RULES[at["rule"]], h)
    if norms is not None and at["rule"] == RULE_CODES["fg_sgd"]:
        _write_norms(norms, x.individual, kept, moved.r)
    members = members[kept]
    _write(param, layout, members, moved.w)
    if moved.m is not None:
        _write(momentum, layout, members, moved.m)
    if moved.v is not None:
        variance[members] = moved.v.flatten()
    return x.w.shape[0] - members.numel()


def _write_norms(norms: Tensor, individual: bool, kept: Tensor, r: Tensor | None) -> None:
    """Write ``r (kept, 1, 1)``, R of every component that stepped, to the entries of its group."""
    assert r is not None
    r = torch.where(r.isfinite(), r, math.nan).flatten().to(norms.device)
    if individual:
        norms[kept.to(norms.device)] = r
    else:
        norms[0] = r[0] if r.numel() else 0


def _move_finite(x: Components, rule: Rule, h: Hyper) -> tuple[Tensor, Moved]:
    """Which components start from finite numbers and reach finite numbers, and these, moved by ``rule``."""
    start = all_finite(x.g) & all_finite(x.w)
    if not start.any():
        return start.flatten().nonzero().flatten(), Moved(x.w[:0], r=x.s[:0])
    rows = start.flatten().nonzero().flatten()
    moved = rule(
        replace(x, w=x.w[rows], g=x.g[rows], m=_rows(x.m, rows), v=_rows(x.v, rows), s=x.s[rows]),
        h,
    )
    end = all_finite(moved.w) if moved.m is None else all_finite(moved.w) & all_finite(moved.m)
    kept = end.flatten().nonzero().flatten()
    return rows[kept], Moved(moved.w[kept], *(_rows(state, kept) for state in moved[1:]))


def _rows(x: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if x is None else x[rows]


def _read(tensor: Tensor, layout: Layout, members: Tensor) -> Tensor:
    """The components ``members`` of ``tensor`` as a copied batch ``(k, n, p)``."""
    return views.matrices(tensor, layout)[members]


def _write(tensor: Tensor, layout: Layout, members: Tensor, batch: Tensor) -> None:
    """Write ``batch (k, n, p)`` into the components ``members`` of ``tensor``, and nothing else."""
    view = views.components(tensor, layout).unsqueeze(0)
    count = views.shape_of(tensor, layout).count
    lead = next(dims for dims in range(1, view.dim() + 1) if math.prod(view.shape[:dims]) == count)
    at = torch.unravel_index(members, view.shape[:lead])
    view[at] = batch.reshape(-1, *view.shape[lead:])
