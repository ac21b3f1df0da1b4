"""Steps of any backend on plain tensors: what the tests of all backends are made of.

>>> w = torch.randn(4, 3, 3, 3)
>>> place_(Stiefel(), w, Layout("kernel"))
>>> run = run_steps(reference.step_, [w], [[torch.randn_like(w)]], [group(Stiefel())], [dict(lr=0.1, momentum=0.9)])
>>> run.params[0].shape
torch.Size([4, 3, 3, 3])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manifold_kernels import functional, manifolds, views
from manifold_kernels.manifolds import Euclidean, Grassmann, Manifold, ScaleInvariant
from manifold_kernels.ops import Step
from manifold_kernels.plan import HYPER_COLUMNS, Group, Plan
from manifold_kernels.views import Layout

#: Every hyper-parameter that a test does not name.
DEFAULTS: dict[str, float] = {
    "lr": 0.1,
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": 0.0,
    "maximize": 0.0,
    "rho": 1.0,
    "curvature": 0.0,
    "guard": 1e4,
    "clip": 0.1,
    "beta2": 0.99,
    "eps": 1e-8,
}

Grads = Sequence[Tensor | None]


@dataclass
class Run:
    """The state of an optimizer between steps; the lists hold copies, never the tensors that came in."""

    params: list[Tensor]
    momenta: list[Tensor]
    variances: list[Tensor]
    steps: Tensor
    nonfinite: Tensor


def like(tensor: Tensor, fill: float = 0.0) -> Tensor:
    """A tensor of the same shape, strides and type (``torch.full_like`` keeps strides of dense tensors only)."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).fill_(fill)


def copy(tensor: Tensor) -> Tensor:
    """A copy with the same strides."""
    return like(tensor).copy_(tensor.detach())


def group(
    of: Manifold | str,
    view: str | Layout | None = None,
    *,
    parameter: int = 0,
    hyper: int = 0,
    rule: str | None = None,
    retraction: str | None = None,
    scale: float | Tensor = 1.0,
    **rest: Any,
) -> Group:
    """A row of a plan by names; the view defaults to ``flat``, ``filter`` (PSI, Grassmann) or ``kernel``."""
    of = manifolds.manifold(of)
    if view is None:
        vector = isinstance(of, (ScaleInvariant, Grassmann))
        view = "flat" if isinstance(of, Euclidean) else "filter" if vector else "kernel"
    if rule is None:
        rule = {"scale_invariant": "psi_sgd", "grassmann": "sgd_g"}.get(of.name, "fg_sgd")
    layout = view if isinstance(view, Layout) else Layout(view)
    code = manifolds.retraction_code(of, retraction)
    return Group(parameter, hyper, rule, of.code, code, layout, scale=scale, **rest)


def place_(of: Manifold | str, weight: Tensor, layout: Layout, scale: float | None = None) -> Tensor:
    """``weight``, moved onto the manifold."""
    functional.project_weight_(of, weight, layout, scale)
    return weight


def hyper_table(rows: Sequence[Mapping[str, float]]) -> Tensor:
    """The table of hyper-parameters: ``DEFAULTS`` with each row's own values; unknown names raise."""
    for row in rows:
        if unknown := set(row) - set(HYPER_COLUMNS):
            raise KeyError(f"hyper: unknown {sorted(unknown)}")
    values = [[float({**DEFAULTS, **row}[name]) for name in HYPER_COLUMNS] for row in rows]
    return torch.tensor(values, dtype=torch.float64).reshape(-1, len(HYPER_COLUMNS))


def start(
    params: Sequence[Tensor],
    groups: Sequence[Group],
    hyper: Sequence[Mapping[str, float]],
    *,
    fill: float = 0.0,
) -> Run:
    """Before the first step: copies of ``params`` and the buffers that their groups need, filled with ``fill``."""
    momenta: list[Tensor] = []
    variances: list[Tensor] = []
    for index, param in enumerate(params):
        own = [g for g in groups if g.parameter == index]
        adaptive = [g for g in own if g.rule == "adam_g" and g.manifold != Euclidean.code]
        buffered = adaptive or any({**DEFAULTS, **hyper[g.hyper]}["momentum"] for g in own)
        momenta.append(like(param, fill) if buffered else param.new_empty(0))
        dtype = torch.promote_types(param.dtype, torch.float32)
        count = views.shape_of(param, adaptive[0].layout).count if adaptive else 0
        variances.append(torch.full((count,), fill, dtype=dtype, device=param.device))
    zeros = torch.zeros(len(params), dtype=torch.int64)
    return Run([copy(p) for p in params], momenta, variances, zeros, zeros.clone())


def run_steps(
    step: Step,
    params: Sequence[Tensor] | Run,
    grads_per_step: Sequence[Grads] | Callable[[list[Tensor]], Grads],
    groups: Sequence[Group],
    hyper: Sequence[Mapping[str, float]],
    *,
    count: int | None = None,
    fill: float = 0.0,
    norms: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Run:
    """Take steps with the backend ``step``.

    Args:
        step: the operator.
        params: the weights (copied, strides kept), or a run to continue (moved in place).
        grads_per_step: for each step the list of gradients, or a function of the current weights.
        groups: the rows of the plan.
        hyper: one mapping of hyper-parameters for each number in ``Group.hyper``; others have :data:`DEFAULTS`.
        count: the number of steps where ``grads_per_step`` is a function.
        fill: what the buffers hold before the first step, which must not read it.
        norms: where every step writes R of its groups.
        grad_scale: what the gradients are divided by.
        found_inf: whether steps are skipped.
    """
    run = params if isinstance(params, Run) else start(params, groups, hyper, fill=fill)
    plan = Plan.build(groups, run.params)
    table = hyper_table(hyper)
    if callable(grads_per_step):
        assert count is not None
        gradients, total = grads_per_step, count
    else:
        listed = iter(grads_per_step)
        total = len(grads_per_step)

        def gradients(_: list[Tensor]) -> Grads:
            return next(listed)

    for _ in range(total):
        step(
            run.params,
            list(gradients(run.params)),
            run.momenta,
            run.variances,
            run.steps,
            run.nonfinite,
            plan.groups,
            plan.components,
            plan.scales,
            table,
            norms,
            grad_scale,
            found_inf,
        )
    return run
