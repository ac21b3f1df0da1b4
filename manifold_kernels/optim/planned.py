"""Param groups and the plan that they make: what is on which manifold, in which view, and whether it is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from itertools import chain
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor

from manifold_kernels import fit, views
from manifold_kernels.collection import Collection, retraction_codes
from manifold_kernels.manifolds import Euclidean, Manifold, manifold
from manifold_kernels.optim import constraint, gathering, operands, settings, sharding
from manifold_kernels.optim.groups import check_new, check_parameter, joined, layout_of, structure_of
from manifold_kernels.optim.settings import ParamGroup, on_manifold
from manifold_kernels.plan import Group, Plan
from manifold_kernels.views import Layout


class Planned(torch.optim.Optimizer):
    """An optimizer whose param groups say what its parameters lie on, with the plan that they make."""

    #: The update rule, a name in ``plan.RULES``.
    rule: ClassVar[str]
    #: Manifolds that the rule is defined on, besides the Euclidean space.
    accepts: ClassVar[tuple[type[Manifold | Collection], ...]]
    #: Settings without effect on a manifold, and those without effect in the Euclidean space, with neutral values. The
    #: latter are the defaults too.
    euclidean_only: ClassVar[Mapping[str, object]] = {}
    manifold_only: ClassVar[Mapping[str, object]] = {
        "view": None,
        "retraction": None,
        "transposed": False,
        "channel_groups": 1,
        "rows": 1,
    }
    #: The views offered; the default is that of rules for vectors.
    offered_views: ClassVar[tuple[str, ...]] = ("filter",)

    plan: Plan
    _nonfinite: Tensor
    _structure: list[tuple[Any, ...]]
    _members: list[list[Tensor]]
    _names: list[str]
    _gather: bool

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as in torch. A group that does not fit raises and leaves the optimizer as it was."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group: wanted a dict, got {type(param_group).__name__}.")
        if "params" not in param_group:
            raise ValueError(f"param_group: wanted parameters in 'params', got {sorted(map(str, param_group))}.")
        group = dict(param_group)
        given = frozenset(group)
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        elif not isinstance(group["params"], set):  # torch refuses sets: they have no order
            group["params"] = list(group["params"])
            check_new(group["params"], self.param_groups)
        super().add_param_group(group)
        try:
            self._admit(group, given)
        except BaseException:
            self.param_groups.pop()
            raise

    def _admit(self, group: ParamGroup, given: frozenset[str]) -> None:
        """Check the group just added and extend the plan by it."""
        index = len(self.param_groups) - 1
        try:
            if not isinstance(group["manifold"], Collection):
                group["manifold"] = manifold(group["manifold"])
            self._settle(group, given)
            settings.check(group)
            self._check_manifold(group)
            settings.check_names(group, given, self._names, type(self).__name__)
        except (ValueError, TypeError) as error:
            raise type(error)(f"param group {index}: {error}") from None
        first = len(self._all_parameters()) - len(group["params"])
        plan = joined(self.plan, self._plan_of(index, first))
        self._check_weights(plan, first)
        self.plan = plan
        counts = torch.zeros(len(group["params"]), dtype=torch.int64, device=self._device())
        self._nonfinite = torch.cat([self._nonfinite.to(counts.device), counts])
        self._structure.append(structure_of(group))
        self._members.append(list(group["params"]))
        self._forget()

    def _settle(self, group: ParamGroup, given: Set[str]) -> None:
        """Neutral values for what has no effect in ``group``; raises where such a thing was ``given``."""
        settings.settle(group, given, self._neutral(group))

    def _neutral(self, group: ParamGroup) -> dict[str, object]:
        """The settings without effect in ``group``, with their neutral values."""
        return dict(self.euclidean_only if on_manifold(group) else self.manifold_only)

    def _check_manifold(self, group: ParamGroup) -> None:
        of: Manifold | Collection = group["manifold"]
        if not isinstance(of, (Euclidean, *self.accepts)):
            names = [accepted.name for accepted in self.accepts]
            raise ValueError(f"manifold: {type(self).__name__} wants one of {names} or None, got {str(of)!r}.")
        retraction_codes(of, group["retraction"])
        if group["view"] is not None and group["view"] not in self.offered_views:
            raise ValueError(
                f"view: {type(self).__name__} wants one of {list(self.offered_views)} or None, got {group['view']!r}."
            )

    def _plan_of(self, index: int, first: int) -> Plan:
        """The plan of param group ``index``, whose first parameter has position ``first`` in the optimizer."""
        group = self.param_groups[index]
        groups: list[Group] = []
        gathered = self._gathered()
        for position, parameter in enumerate(group["params"], first):
            try:
                check_parameter(parameter, self._device())
                full = sharding.whole(parameter)
                found = self._groups_of(position, position - first, index, full, layout_of(group, full))
                groups += found if position in gathered else sharding.localized(found, parameter)
            except (ValueError, TypeError) as error:
                raise type(error)(f"{self._where(position)}: {error}") from None
        return Plan.build(groups, self._described())

    def _groups_of(self, position: int, within: int, index: int, parameter: Tensor, layout: Layout) -> list[Group]:
        """The rows of the plan of parameter ``within`` of param group ``index``, at ``position`` in the optimizer."""
        group = self.param_groups[index]
        of: Manifold = group["manifold"]
        (retraction,) = retraction_codes(of, group["retraction"])
        reason = fit.frozen(of, views.shape_of(parameter, layout)) if parameter.numel() else None
        if reason is not None:
            raise ValueError(
                f"view: {layout.view!r} would freeze the weight on the manifold {of.name}: {reason}. "
                "Use another view or manifold, or leave the weight without one."
            )
        return [
            Group(
                parameter=position,
                hyper=index,
                rule=self.rule,
                manifold=of.code,
                retraction=retraction,
                layout=layout,
                scale=fit.scale_of(of, layout, parameter),
            )
        ]

    def violation(self) -> float:
        """The largest violation of a constraint by any component of any weight, relative to its scale (0: none).

        The measure is that of :func:`manifold_kernels.functional.weight_violation`, taken in float64. Of shards it sees
        those on this rank; with ``cut_matrices="gather"`` all ranks have to ask.
        """
        weights = self._weights(self._all_parameters())
        found = [each.violation for each in constraint.violations(self.plan, weights)]
        # Unlike Python's, this maximum is NaN if any is.
        return float(torch.tensor([0.0, *found], dtype=torch.float64, device="cpu").max())

    def check(self) -> None:
        """Raise ``ValueError`` for the first weight that is off its manifold by more than rounding explains.

        The tolerance counts roundings of the storage type (:func:`~manifold_kernels.optim.constraint.tolerance`). The
        same check runs at construction, in :meth:`add_param_group` and in :meth:`load_state_dict`, not at every step.
        """
        self._check_weights(self.plan)

    def _check_weights(self, plan: Plan, first: int = 0, weights: Sequence[Tensor] | None = None) -> None:
        weights = self._weights(weights or self._all_parameters(), first)
        for found in constraint.violations(plan, weights, first):
            if not found.violation <= found.tolerance:
                raise ValueError(
                    f"{self._where(found.parameter)}: is off its manifold. Wanted {found.manifold} up to "
                    f"{found.tolerance:.2g}, got a violation of {found.violation:.2g}. Project the weight with "
                    "manifold_kernels.functional.project_weight_(manifold, weight, layout), or let "
                    "manifold_kernels.param_groups make the groups, which projects by itself."
                )

    def parameter_names(self) -> list[str]:
        """The name of every parameter, or its position in words where none was given."""
        names: list[str] = []
        for index, group in enumerate(self.param_groups):
            known = _names_in(group)
            names += known or [f"param group {index}, parameter {at}" for at in range(len(group["params"]))]
        return names

    def _where(self, position: int) -> str:
        """The parameter at ``position`` in words."""
        name, within = self.parameter_names()[position], position
        for index, group in enumerate(self.param_groups):
            if within < len(group["params"]):
                where = f"param group {index}, parameter {within}"
                named = "" if name == where else f" ({name})"
                return f"{where}{named} of shape {tuple(group['params'][within].shape)}"
            within -= len(group["params"])
        raise IndexError(position)

    def _all_parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _check_members(self, same: bool = True) -> None:
        """Raise ``ValueError`` unless the param groups have as many parameters as the plan, and the ``same`` ones."""
        groups = [group["params"] for group in self.param_groups]
        fits = list(map(len, groups)) == list(map(len, self._members))
        if not fits or (same and not all(map(is_, chain(*groups), chain(*self._members)))):
            raise ValueError(
                "param_groups: wanted the parameters that the optimizer was made with, group by group, got others. "
                "Call optimizer.rebind(model) where parameters took the place of others, add_param_group for more, and "
                "make a new optimizer to leave some out. Nothing was written."
            )

    def _gathered(self) -> dict[int, Tensor]:
        """The parameters whose matrices are put together for a step, by their positions."""
        if not self._gather:
            return {}
        pairs = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        return {
            position: parameter
            for position, (group, parameter) in enumerate(pairs)
            if operands.is_sharded(parameter)
            and sharding.is_cut(parameter, layout_of(group, sharding.whole(parameter)))
        }

    def _described(self) -> list[Tensor]:
        """Tensors of the shapes that the plan is about: parameters, shards, or without memory what is gathered."""
        gathered = self._gathered()
        return [
            sharding.whole(parameter) if position in gathered else operands.local(parameter)
            for position, parameter in enumerate(self._all_parameters())
        ]

    def _weights(self, held: Sequence[Tensor], first: int = 0) -> list[Tensor]:
        """The weights that the plan is about, from position ``first`` on; ``held`` are the parameters or masters."""
        weights, gathered = [operands.local(each) for each in held], self._gathered()
        for position in gathered:
            if position >= first:
                weights[position] = gathering.assembled(held[position])
        return weights

    def _device(self) -> torch.device:
        parameters = self._all_parameters()
        return parameters[0].device if parameters else torch.device("cpu")

    def _forget(self) -> None:
        """Make the next step put together anew what it reads."""
        raise NotImplementedError


def _names_in(group: ParamGroup) -> list[str] | None:
    """The names of the parameters of ``group``, in torch's entry or that of ``param_groups``."""
    for entry in ("param_names", "names"):
        names = group.get(entry)
        if isinstance(names, (list, tuple)) and len(names) == len(group["params"]):
            return list(map(str, names))
    return None
