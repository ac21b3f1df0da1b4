"""The plan of a step: what does not change between steps, as plain tensors that every backend reads.

A *group* (a row of :attr:`Plan.groups`) is a set of components of one parameter on one manifold. Its components share
one norm and one step size ([FG] Theorem 1), or have one each where ``individual`` is set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_kernels import views
from manifold_kernels.manifolds import (
    MANIFOLDS,
    RETRACTIONS,
    Euclidean,
    Grassmann,
    Manifold,
    Oblique,
    ScaleInvariant,
    Sphere,
    Stiefel,
)
from manifold_kernels.views import Layout

#: Update rules: [FG] Algorithm 1, [PSI] Eq. 9-11, SGD-G and Adam-G of Cho & Lee (2017).
RULES: dict[str, int] = {"fg_sgd": 0, "psi_sgd": 1, "sgd_g": 2, "adam_g": 3}

#: The manifolds that each rule steps, by its number.
STEPPED_BY: tuple[tuple[type[Manifold], ...], ...] = (
    (Euclidean, Sphere, Oblique, Stiefel),
    (Euclidean, ScaleInvariant),
    (Euclidean, Grassmann),
    (Euclidean, Grassmann),
)

#: Step-size rules of [FG]: no bound, or Eq. 5 with rho and c (Corollary 2 is rho = 1, c = 0).
STEP_SIZES: dict[str, int] = {"none": 0, "general": 1}

#: Columns of ``Plan.groups``.
GROUP_COLUMNS: tuple[str, ...] = (
    "parameter",  # position in the lists of tensors
    "hyper",  # row of the table of hyper-parameters
    "rule",  # RULES
    "manifold",  # Manifold.code; a Euclidean group takes the step of torch.optim.SGD whatever its rule
    "retraction",  # RETRACTIONS
    "view",  # VIEWS, with the next three the Layout
    "out_dim",
    "channel_groups",
    "rows",
    "individual",  # 1: every component has its own norm and step size
    "step_size",  # STEP_SIZES
    "first",  # the components are [first, first + count), or where listed is 1
    "count",  # Plan.components[first : first + count]
    "listed",
    "scale",  # component k of the group has scale Plan.scales[scale + k * scale_stride]
    "scale_stride",
)

#: Columns of the table of hyper-parameters, float64, one row for each parameter group of the optimizer.
HYPER_COLUMNS: tuple[str, ...] = (
    "lr",
    "momentum",  # theta_mu; beta_1 for Adam-G
    "dampening",  # 1 - theta_E
    "weight_decay",  # Euclidean and scale-invariant groups only
    "nesterov",
    "maximize",
    "rho",  # [FG] Eq. 5
    "curvature",  # [FG] Eq. 5, c
    "guard",  # [PSI] section 6.2: the norm above which w and u are divided by it
    "clip",  # nu of SGD-G and Adam-G
    "beta2",  # Adam-G
    "eps",  # Adam-G
)


@dataclass(frozen=True)
class Group:
    """One row of a plan before it becomes numbers.

    Args:
        parameter: position of the parameter in the optimizer.
        hyper: position of its parameter group.
        rule: a name in :data:`RULES`.
        manifold: ``Manifold.code``.
        retraction: a number in ``manifolds.RETRACTIONS``.
        layout: how the parameter becomes matrices.
        individual: one norm and step size for each component instead of one for all.
        step_size: a name in :data:`STEP_SIZES`.
        scale: one scale for all components, or a float64 tensor with one each.
        components: numbers of the components, or ``None`` for all of the parameter.
    """

    parameter: int
    hyper: int
    rule: str
    manifold: int
    retraction: int
    layout: Layout
    individual: bool = False
    step_size: str = "none"
    scale: float | Tensor = 1.0
    components: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """Tensors of a plan.

    Attributes:
        groups: int64 ``(groups, len(GROUP_COLUMNS))``.
        components: int64, the listed component numbers of all groups.
        scales: float64, the scales of all groups.
    """

    groups: Tensor
    components: Tensor
    scales: Tensor

    @staticmethod
    def build(groups: Sequence[Group], parameters: Sequence[Tensor]) -> Plan:
        """The plan of ``groups`` over ``parameters``; raises ``ValueError`` where a group does not fit."""
        rows: list[list[int]] = []
        listed: list[Tensor] = []
        scales: list[Tensor] = []
        n_listed = n_scales = 0
        for group in groups:
            layout = group.layout
            total = views.shape_of(parameters[group.parameter], layout).count
            count = total if group.components is None else group.components.numel()
            first = 0
            if group.components is not None:
                first = n_listed
                n_listed += count
                listed.append(group.components.to("cpu", torch.int64).reshape(-1))
            scale = torch.as_tensor(group.scale, dtype=torch.float64, device="cpu").reshape(-1)
            rows.append(
                [
                    group.parameter,
                    group.hyper,
                    RULES[group.rule],
                    group.manifold,
                    group.retraction,
                    views.VIEWS[layout.view],
                    layout.out_dim,
                    layout.channel_groups,
                    layout.rows,
                    int(group.individual),
                    STEP_SIZES[group.step_size],
                    first,
                    count,
                    int(group.components is not None),
                    n_scales,
                    int(scale.numel() > 1),
                ]
            )
            n_scales += scale.numel()
            scales.append(scale)
        plan = Plan(
            torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, len(GROUP_COLUMNS)),
            torch.cat(listed) if listed else torch.empty(0, dtype=torch.int64, device="cpu"),
            torch.cat(scales) if scales else torch.empty(0, dtype=torch.float64, device="cpu"),
        )
        plan.check(parameters)
        return plan

    def column(self, name: str) -> Tensor:
        """Column ``name`` of :attr:`groups`."""
        return self.groups[:, GROUP_COLUMNS.index(name)]

    def layout(self, row: int) -> Layout:
        """The layout of group ``row``."""
        view = {code: name for name, code in views.VIEWS.items()}
        at = {name: int(value) for name, value in zip(GROUP_COLUMNS, self.groups[row].tolist(), strict=True)}
        if at["view"] not in view:
            raise ValueError(f"plan: group {row} has view {at['view']}, wanted one of {sorted(view)}.")
        return Layout(view[at["view"]], at["out_dim"], at["channel_groups"], at["rows"])

    def members(self, row: int) -> Tensor:
        """The component numbers of group ``row``."""
        at = dict(zip(GROUP_COLUMNS, self.groups[row].tolist(), strict=True))
        if at["listed"]:
            return self.components[at["first"] : at["first"] + at["count"]]
        return torch.arange(at["first"], at["first"] + at["count"], device="cpu")

    def scale(self, row: int) -> Tensor:
        """The scales of the components of group ``row`` (one element where they share it)."""
        at = dict(zip(GROUP_COLUMNS, self.groups[row].tolist(), strict=True))
        size = at["count"] if at["scale_stride"] else 1
        return self.scales[at["scale"] : at["scale"] + size]

    def rescaled(self, parameter: int, scales: Tensor | float) -> tuple[Plan, Layout, Tensor]:
        """The plan with new scales for the components of ``parameter``, whatever is their manifold's.

        Returns:
            the plan, the layout of the parameter, and the ratio of new to old scales of all components (1 where a
            component has none), float64 ``(components,)``.
        """
        rows = (self.column("parameter") == parameter).nonzero().flatten().tolist()
        total = int(self.column("count")[rows].sum())
        wanted = torch.as_tensor(scales, dtype=torch.float64, device="cpu")
        if wanted.dim() and wanted.shape != (total,):
            raise ValueError(f"scales: wanted one number or {total}, one a component, got {tuple(wanted.shape)}.")
        wanted = wanted.expand(total)
        scaled = {manifold.code for manifold in MANIFOLDS if hasattr(manifold, "scale")}
        moving = [row for row in rows if int(self.groups[row, GROUP_COLUMNS.index("manifold")]) in scaled]
        if not moving:
            raise ValueError("scales: wanted a parameter on spheres, oblique or Stiefel manifolds, got one without.")
        # Rows of one scale get one a component at the end of the tensor; those that have them are overwritten.
        groups, kept, end = self.groups.clone(), self.scales.clone(), self.scales.numel()
        added: list[Tensor] = []
        ratios = torch.ones(total, dtype=torch.float64, device="cpu")
        for row in moving:
            members = self.members(row)
            new = wanted[members]
            if not bool(((new > 0) & new.isfinite()).all()):
                raise ValueError("scales: wanted finite numbers > 0.")
            ratios[members] = new / self.scale(row)
            at = dict(zip(GROUP_COLUMNS, groups[row].tolist(), strict=True))
            if at["scale_stride"]:
                kept[at["scale"] : at["scale"] + new.numel()] = new
                continue
            groups[row, GROUP_COLUMNS.index("scale")] = end
            groups[row, GROUP_COLUMNS.index("scale_stride")] = 1
            added.append(new)
            end += new.numel()
        return Plan(groups, self.components, torch.cat([kept, *added])), self.layout(rows[0]), ratios

    def check(self, parameters: Sequence[Tensor]) -> None:
        """Raise ``ValueError`` unless every number of the plan is in range for ``parameters``.

        Backends read through these numbers without looking again, so that every plan, a loaded one above all, must
        have passed this. Every component of a parameter that has a group must be in exactly one.
        """
        if self.groups.dim() != 2 or self.groups.shape[1] != len(GROUP_COLUMNS):
            raise ValueError(f"plan: wanted groups (*, {len(GROUP_COLUMNS)}), got {tuple(self.groups.shape)}.")
        for name, dtype in (("groups", torch.int64), ("components", torch.int64), ("scales", torch.float64)):
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
                raise ValueError(
                    f"plan: wanted {name} contiguous {dtype} on the CPU, got {tensor.dtype}, {tensor.device}."
                )
        if not bool(torch.isfinite(self.scales).all()) or bool((self.scales <= 0).any()):
            raise ValueError("plan: wanted finite scales > 0.")
        by_code = {manifold.code: manifold for manifold in MANIFOLDS}
        covered: dict[int, list[Tensor]] = {}
        layouts: dict[int, Layout] = {}
        for row, values in enumerate(self.groups.tolist()):
            at = dict(zip(GROUP_COLUMNS, values, strict=True))
            self._check_range(row, at, "parameter", len(parameters))
            self._check_range(row, at, "rule", len(RULES))
            self._check_range(row, at, "manifold", len(MANIFOLDS))
            of = by_code[at["manifold"]]
            if at["retraction"] not in [RETRACTIONS[name] for name in of.retractions]:
                raise ValueError(f"plan: group {row} has retraction {at['retraction']}, wanted one of {of.name}.")
            if of not in STEPPED_BY[at["rule"]]:
                raise ValueError(f"plan: group {row} has rule {at['rule']}, which does not step {of.name}.")
            if at["hyper"] < 0:
                raise ValueError(f"plan: group {row} has hyper {at['hyper']}, wanted 0 or more.")
            for flag in ("individual", "step_size", "listed", "scale_stride"):
                self._check_range(row, at, flag, 2)
            layout = self.layout(row)
            if layouts.setdefault(at["parameter"], layout) != layout:
                raise ValueError(f"plan: parameter {at['parameter']} has groups of different views.")
            total = views.shape_of(parameters[at["parameter"]], layout).count
            if at["first"] < 0 or at["count"] < 0:
                raise ValueError(f"plan: group {row} has first {at['first']} and count {at['count']}.")
            end = at["first"] + at["count"]
            if end > (self.components.numel() if at["listed"] else total):
                raise ValueError(f"plan: group {row} ends at component {end}, beyond the last.")
            last_scale = at["scale"] + (max(at["count"] - 1, 0) if at["scale_stride"] else 0)
            self._check_range(row, {"scale": last_scale}, "scale", self.scales.numel())
            self._check_range(row, at, "scale", self.scales.numel())
            members = self.members(row)
            if members.numel() and not (int(members.min()) >= 0 and int(members.max()) < total):
                raise ValueError(f"plan: group {row} lists a component outside [0, {total}).")
            covered.setdefault(at["parameter"], []).append(members)
        for parameter, lists in covered.items():
            total = views.shape_of(parameters[parameter], layouts[parameter]).count
            times = torch.bincount(torch.cat(lists), minlength=total)
            if not bool((times == 1).all()):
                wrong = int((times != 1).nonzero()[0])
                raise ValueError(
                    f"plan: component {wrong} of parameter {parameter} is in {int(times[wrong])} groups, not 1."
                )

    @staticmethod
    def _check_range(row: int, at: dict[str, int], name: str, end: int) -> None:
        if not 0 <= at[name] < end:
            raise ValueError(f"plan: group {row} has {name} {at[name]}, wanted 0 to {end - 1}.")
