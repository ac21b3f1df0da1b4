"""The settings of a parameter group: what is allowed, and how they become numbers, plain data and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence, Set
from difflib import get_close_matches
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from manifold_kernels.collection import Assignment, Collection
from manifold_kernels.manifolds import BY_NAME, Euclidean, Manifold
from manifold_kernels.optim.memory import check_memory
from manifold_kernels.plan import HYPER_COLUMNS

ParamGroup = dict[str, Any]

_NOT_NEGATIVE = (lambda value: 0 <= value < math.inf, "a finite number >= 0")
_POSITIVE = (lambda value: value > 0, "a number > 0 (math.inf: never)")

#: Settings that are one number: the test that they must pass, and the test in words.
NUMBERS: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "lr": _NOT_NEGATIVE,
    "momentum": _NOT_NEGATIVE,
    "dampening": (math.isfinite, "a finite number"),
    "weight_decay": _NOT_NEGATIVE,
    "rho": _NOT_NEGATIVE,
    "curvature": _NOT_NEGATIVE,
    "guard": _POSITIVE,
    "clip": _POSITIVE,
    "eps": (lambda value: 0 < value < math.inf, "a finite number > 0"),
}

#: Settings with a few possible values.
CHOICES: Mapping[str, tuple[object, ...]] = {
    "nesterov": (False, True),
    "maximize": (False, True),
    "view": (None, "kernel", "filter", "matrix"),
    "grouping": ("layer", "individual"),
    "transposed": (False, True),
    "step_size": ("corollary2", "general", "none"),
}

#: Settings that the plan is made of. They are fixed once a group is in an optimizer.
STRUCTURE: tuple[str, ...] = (
    "manifold",
    "assignments",
    "view",
    "retraction",
    "grouping",
    "transposed",
    "channel_groups",
    "rows",
    "step_size",
)

#: Everything above that optimizers know; a group may carry more (schedulers add ``initial_lr``), which is left alone.
KNOWN = frozenset({*NUMBERS, *CHOICES, *STRUCTURE, "betas"})

#: Settings of torch's optimizers that these have not.
_OF_TORCH = ("fused", "foreach", "capturable", "differentiable", "amsgrad")


def check_names(group: ParamGroup, given: Set[str], own: Sequence[str], kind: str) -> None:
    """Raise ``ValueError`` for the first name ``given`` in ``group`` that somebody took for a setting of ``kind``.

    Its own are in ``own``. Names that are like none of them are left alone.
    """
    for name in given - {*own, "params"}:
        (near,) = get_close_matches(str(name), KNOWN, n=1, cutoff=0.85) or (None,)
        if near is not None or (name in _OF_TORCH and group[name]):
            meant = f"did you mean {near!r}?" if near in own else f"{kind} has {sorted(own)}."
            raise ValueError(f"{name}: is no setting of {kind} and would have no effect: {meant}")


def check(group: ParamGroup) -> None:
    """Raise ``ValueError`` or ``TypeError`` for the first setting of ``group`` that is not allowed."""
    for name, (allowed, words) in NUMBERS.items():
        if name in group:
            _check_number(name, group[name], allowed, words)
    for name, choices in CHOICES.items():
        # Not "in": 1 == True, but a flag is a flag.
        if name in group and not any(group[name] is choice or _same_word(group[name], choice) for choice in choices):
            raise ValueError(f"{name}: wanted one of {list(choices)}, got {group[name]!r}.")
    for name in ("channel_groups", "rows"):
        if isinstance(group[name], bool) or not isinstance(group[name], int) or group[name] < 1:
            raise ValueError(f"{name}: wanted a whole number >= 1, got {group[name]!r}.")
    if "betas" in group:
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas: wanted two numbers in [0, 1), got {betas!r}.")
        for index, beta in enumerate(betas):
            _check_number(f"betas[{index}]", beta, lambda value: 0 <= value < 1, "a number in [0, 1)")
    if group.get("nesterov") and (not has_momentum(group) or group.get("dampening", 0) != 0):
        raise ValueError(
            f"nesterov: needs momentum > 0 and dampening = 0, got momentum={group['momentum']!r} and "
            f"dampening={group.get('dampening', 0)!r}."
        )


def _same_word(value: object, choice: object) -> bool:
    return isinstance(value, str) and value == choice


def _check_number(name: str, value: object, allowed: Callable[[float], bool], words: str) -> None:
    if isinstance(value, Tensor):
        check_memory(name, value)
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"{name}: wanted a tensor of one element, got {value.dtype} {tuple(value.shape)}.")
        if value.device.type != "cpu":
            return  # looking at it would mean to wait for the device
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: wanted {words}, got {value!r} of type {type(value).__name__}.")
    try:
        fits = allowed(float(value))
    except OverflowError:  # a whole number that no float is as large as
        fits = False
    if not fits:
        raise ValueError(f"{name}: wanted {words}, got {value!r}.")


def settle(group: ParamGroup, given: Set[str], neutral: Mapping[str, object]) -> None:
    """Set the settings in ``neutral``, which would have no effect in ``group``, to the value that says so.

    Defaults of the optimizer, meant for other groups, give way; a value ``given`` for this very group raises
    ``ValueError``.
    """
    for name, value in neutral.items():
        if name in given and group[name] != value:
            others = {key: group[key] for key in ("manifold", "step_size") if key in group}
            raise ValueError(
                f"{name}: has no effect in a group with {others}, wanted {value!r} or nothing, got {group[name]!r}. "
                "Leave it out, or set it where it applies."
            )
        group[name] = value


def has_momentum(group: ParamGroup) -> bool:
    """Whether ``group`` has buffers: its momentum is not zero, or a tensor, which may become what it likes."""
    return isinstance(group["momentum"], Tensor) or bool(group["momentum"] != 0)


def hyper_row(group: ParamGroup) -> list[float | Tensor]:
    """The row of the table of hyper-parameters (``plan.HYPER_COLUMNS``) that ``group`` stands for."""
    return [group.get(column, 0.0) for column in HYPER_COLUMNS]


def hyper_table(rows: Sequence[Sequence[float | Tensor]]) -> Tensor:
    """The table of ``rows``, with 1 in place of numbers in tensors: it says which terms there are."""
    numbers = [[1.0 if isinstance(value, Tensor) else float(value) for value in row] for row in rows]
    return torch.tensor(numbers, dtype=torch.float64, device="cpu").reshape(-1, len(HYPER_COLUMNS))


def tables(rows: Sequence[Sequence[float | Tensor]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """``hyper`` and ``live`` of the operator, as operations on tensors alone."""
    hyper = hyper_table(rows)
    tensors = in_tensors(rows)
    if not tensors:
        return hyper, None
    live = hyper.to(device, copy=True)
    for row, column, value in tensors:
        live[row, column] = value
    return hyper, live


def in_tensors(rows: Sequence[Sequence[float | Tensor]]) -> list[tuple[int, int, Tensor]]:
    """Row, column and tensor of every number in ``rows`` that is in one."""
    found = ((r, c, value) for r, row in enumerate(rows) for c, value in enumerate(row))
    return [(r, c, value.detach().reshape(())) for r, c, value in found if isinstance(value, Tensor)]


def pack(group: ParamGroup) -> ParamGroup:
    """``group`` as plain data: its manifold becomes its name and fields, assignments tensors, numbers Python's.

    >>> from manifold_kernels.manifolds import Sphere
    >>> pack({"lr": 0.1, "manifold": Sphere(2.0)})
    {'lr': 0.1, 'manifold': {'name': 'sphere', 'scale': 2.0}}
    """
    numbers = {name: _pack_number(group[name]) for name in NUMBERS.keys() & group.keys()}
    packed = {**group, **numbers, "manifold": _pack_manifold(group["manifold"])}
    if "betas" in group:
        packed["betas"] = tuple(map(_pack_number, group["betas"]))
    if group.get("assignments") is not None:
        packed["assignments"] = [{"groups": one.groups, "manifolds": one.manifolds} for one in group["assignments"]]
    return packed


def _pack_number(value: Any) -> float | Tensor:
    """Schedules may compute in NumPy, whose numbers ``weights_only=True`` does not load."""
    return value if isinstance(value, (Tensor, int)) else float(value)


def _pack_manifold(of: Manifold | Collection) -> dict[str, Any]:
    if isinstance(of, Collection):
        fields = {field.name: getattr(of, field.name) for field in dataclasses.fields(of)}
        return {"name": "collection", **fields, "manifolds": [_pack_manifold(member) for member in of.manifolds]}
    return {"name": of.name, **dataclasses.asdict(of)}


def unpack(group: ParamGroup) -> ParamGroup:
    """The inverse of :func:`pack`."""
    unpacked = {**group, "manifold": _unpack_manifold(group["manifold"])}
    saved = group.get("assignments")
    if saved is not None:
        if not isinstance(saved, (list, tuple)) or not all(
            isinstance(one, dict) and {"groups", "manifolds"} <= one.keys() for one in saved
        ):
            raise ValueError(f"assignments: wanted a list of dicts of 'groups' and 'manifolds', got {saved!r}.")
        for one in saved:
            for name in ("groups", "manifolds"):
                check_memory(f"assignments: {name}", one[name])
        unpacked["assignments"] = tuple(Assignment(one["groups"], one["manifolds"]) for one in saved)
    return unpacked


def _unpack_manifold(packed: object) -> Manifold | Collection:
    if not isinstance(packed, dict) or packed.get("name") not in {*BY_NAME, "collection"}:
        raise ValueError(f"manifold: wanted a dict with a 'name' out of {sorted(BY_NAME)}, got {packed!r}.")
    fields = {name: value for name, value in packed.items() if name != "name"}
    try:
        if packed["name"] == "collection":
            return Collection(**{**fields, "manifolds": tuple(map(_unpack_manifold, fields["manifolds"]))})
        return BY_NAME[packed["name"]](**fields)
    except (TypeError, KeyError) as error:
        raise ValueError(f"manifold: {packed!r} does not describe one: {error}.") from None


def on_manifold(group: ParamGroup) -> bool:
    """Whether the group's weights lie on a manifold other than the Euclidean space."""
    return not isinstance(group["manifold"], Euclidean)
