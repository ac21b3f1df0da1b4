"""State dicts: what is written besides torch's entries, and how a state is checked before anything is taken over."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from manifold_kernels.collection import Collection
from manifold_kernels.optim import settings
from manifold_kernels.optim.groups import DTYPES
from manifold_kernels.optim.memory import check_memory
from manifold_kernels.optim.operands import like, local, wants_master
from manifold_kernels.optim.settings import ParamGroup
from manifold_kernels.optim.sharding import as_sharded
from manifold_kernels.plan import GROUP_COLUMNS, Plan

VERSION = 1
_ENTRIES = ("state", "param_groups", "version", "plan", "nonfinite")
_PLAN = ("groups", "components", "scales")
#: Counts are below this: there are no more steps, and a step more is still an int64.
_COUNT = 2**53
#: Columns of a plan that must agree with the one that the param groups describe. Scales may have been moved.
_AGREE = tuple(name for name in GROUP_COLUMNS if name not in ("scale", "scale_stride"))


def new_buffer(name: str, weight: Tensor, components: int) -> Tensor:
    """The buffer ``name`` of ``weight``, zero: one number a component for ``exp_avg_sq``, else one a weight.

    The latter has the strides of the weight, also where that is not dense.
    """
    if name == "exp_avg_sq":
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return torch.zeros(components, dtype=dtype, device=weight.device)
    return like(weight, weight.dtype).zero_()


def component_counts(plan: Plan, parameters: int) -> list[int]:
    """The number of components of every parameter."""
    counts = torch.zeros(parameters, dtype=torch.int64, device="cpu")
    return counts.index_add_(0, plan.column("parameter"), plan.column("count")).tolist()


def extras(plan: Plan, nonfinite: Tensor) -> dict[str, Any]:
    """The entries of a state dict that torch does not know."""
    return {"version": VERSION, "plan": {name: getattr(plan, name) for name in _PLAN}, "nonfinite": nonfinite}


def check_entries(saved: dict[str, Any]) -> bool:
    """Raise unless ``saved`` has all entries and a known version, or torch's own two alone; whether it has all."""
    whole = any(entry in saved for entry in _ENTRIES[2:])
    for entry in _ENTRIES if whole else _ENTRIES[:2]:
        if entry not in saved:
            raise ValueError(f"state_dict: wanted the entries {list(_ENTRIES)}, {entry!r} is missing.")
    if whole and saved["version"] != VERSION:
        raise ValueError(f"state_dict: wanted version {VERSION}, got {saved['version']!r}.")
    for entry, kind in (("state", dict), ("param_groups", list), ("plan", dict), ("nonfinite", Tensor)):
        if entry in saved and not isinstance(saved[entry], kind):
            raise ValueError(f"state_dict: wanted {entry!r} as {kind.__name__}, got {type(saved[entry]).__name__}.")
    for entry in saved["param_groups"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("params"), list):
            raise ValueError(f"state_dict: wanted param groups as dicts with a list 'params', got {entry!r}.")
    seen = set()
    for key in (key for entry in saved["param_groups"] for key in entry["params"]):
        if not isinstance(key, (int, str)):
            raise ValueError(f"state_dict: params: wanted numbers or names, got {key!r}.")
        if key in seen:
            raise ValueError(f"state_dict: param groups: wanted every key once, got {key!r} twice.")
        seen.add(key)
    for key, entries in saved["state"].items():
        if not isinstance(entries, dict):
            raise ValueError(f"state_dict: wanted the state of parameter {key!r} as a dict, got {entries!r}.")
    return whole


def load_groups(saved: list[ParamGroup], current: list[ParamGroup], names: Sequence[str]) -> list[ParamGroup]:
    """Copies of the ``saved`` groups with the parameters of the ``current`` ones."""
    if len(saved) != len(current):
        raise ValueError(f"state_dict: wanted {len(current)} param groups, got {len(saved)}.")
    groups = []
    for index, (new, old) in enumerate(zip(saved, current, strict=True)):
        for name in ("params", *names):
            if name not in new:
                raise ValueError(f"state_dict: param group {index} lacks {name!r}.")
        if len(new["params"]) != len(old["params"]):
            raise ValueError(
                f"state_dict: wanted {len(old['params'])} parameters in param group {index}, got {len(new['params'])}."
            )
        kept: ParamGroup = {name: old[name] for name in ("param_names", "names") if name in old}
        try:
            groups.append({**settings.unpack(deepcopy(new)), **kept, "params": old["params"]})
        except ValueError as error:
            raise ValueError(f"state_dict: param group {index}: {error}") from None
    return groups


def load_plan(saved: dict[str, Any], expected: Plan, parameters: Sequence[Tensor]) -> tuple[Plan, Tensor]:
    """The saved plan and counts of non-finite components, copied; they must fit ``expected`` and ``parameters``."""
    for name in _PLAN:
        check_memory(f"state_dict: plan[{name!r}]", saved["plan"].get(name))
    plan = Plan(*(saved["plan"][name].detach().clone() for name in _PLAN))
    if plan.groups.shape == expected.groups.shape:
        _check_same(plan, expected)
    plan.check(parameters)
    if plan.groups.shape != expected.groups.shape:
        raise ValueError(f"state_dict: wanted a plan of {len(expected.groups)} groups, got {len(plan.groups)}.")
    if not torch.equal(plan.components, expected.components):
        raise ValueError("state_dict: plan: components are not those that the param groups assign.")
    nonfinite = saved["nonfinite"]
    check_memory("state_dict: nonfinite", nonfinite)
    counts = nonfinite.dtype == torch.int64 and nonfinite.shape == (len(parameters),)
    if not counts or bool(((nonfinite < 0) | (nonfinite >= _COUNT)).any()):
        raise ValueError(
            f"state_dict: wanted nonfinite as {len(parameters)} counts in int64, got {nonfinite.dtype} "
            f"{tuple(nonfinite.shape)} {nonfinite.tolist()[:8]}."
        )
    return plan, nonfinite.detach().to("cpu", copy=True).contiguous()


def _check_same(plan: Plan, expected: Plan) -> None:
    for name in _AGREE:
        wrong = (plan.column(name) != expected.column(name)).nonzero()
        if wrong.numel():
            row = int(wrong[0])
            raise ValueError(
                f"state_dict: plan: group {row} has {name} {int(plan.column(name)[row])}, the optimizer's param groups "
                f"say {int(expected.column(name)[row])}. Load into an optimizer made as the saved one was."
            )


def load_state(
    saved: dict[str, Any],
    groups: list[ParamGroup],
    plan: Plan,
    buffers: Callable[[ParamGroup], tuple[str | None, str | None]],
    where: Callable[[int], str],
    master_weights: bool,
    gathered: Set[int],
) -> dict[Tensor, dict[str, Any]]:
    """The saved states, copied, by parameter; every buffer must have its shape and strides.

    Another floating-point type is converted, as torch does, so that a model may go on in another one.
    """
    owners = [group for group in groups for _ in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    positions = {key: n for n, key in enumerate(key for group in saved["param_groups"] for key in group["params"])}
    counts = component_counts(plan, len(parameters))
    state: dict[Tensor, dict[str, Any]] = {}
    for key, entries in saved["state"].items():
        if key not in positions:
            raise ValueError(f"state_dict: has a state for parameter {key!r}, which is in no param group.")
        position = positions[key]
        parameter = parameters[position]
        try:
            needed = {name for name in buffers(owners[position]) if name is not None}
            weight = local(parameter)
            if wants_master(parameter, master_weights):
                weight = like(weight, torch.float32)
                if "master" in entries:  # else it is made from the weight, as for a training that had none
                    needed.add("master")
            own = _load_entries(entries, needed, weight, counts[position])
            _check_values(own, owners[position])
            if "master" in needed and not torch.equal(own["master"].to(parameter.dtype), local(parameter)):
                raise ValueError("master: its rounding is not the weight. Load the model's weights first.")
            state[parameter] = {
                name: value if name == "step" else as_sharded(value, parameter, position in gathered)
                for name, value in own.items()
            }
        except ValueError as error:
            raise ValueError(f"state_dict: state of {where(position)}: {error}") from None
    for position, parameter in enumerate(parameters):
        if state and parameter not in state:
            raise ValueError(f"state_dict: wanted a state for {where(position)}, got none.")
    return state


def _load_entries(entries: dict[str, Any], needed: set[str], weight: Tensor, components: int) -> dict[str, Any]:
    step: Any = entries.get("step")
    check_memory("step", step)
    if step.dtype != torch.int64 or step.dim() or not 0 <= int(step) < _COUNT:
        raise ValueError(f"step: wanted an int64 tensor of no dimensions >= 0, got {step!r}.")
    # A momentum buffer may also be there from before momentum was switched off.
    known = needed | {"momentum_buffer"}
    for name in needed - entries.keys():
        raise ValueError(f"{name}: is missing.")
    loaded: dict[str, Any] = {"step": step.detach().to("cpu", copy=True)}
    for name, value in entries.items():
        if name == "step":
            continue
        if name not in known:
            raise ValueError(f"{name}: wanted one of {sorted(known | {'step'})}.")
        buffer = new_buffer(name, weight, components)
        value = local(value) if isinstance(value, Tensor) else value
        _check_like(name, value, buffer)
        loaded[name] = buffer.copy_(value)
    return loaded


def _check_like(name: str, value: Any, buffer: Tensor) -> None:
    check_memory(name, value)
    if value.shape != buffer.shape:
        raise ValueError(f"{name}: wanted shape {tuple(buffer.shape)}, got {tuple(value.shape)}.")
    if value.dtype not in _saved_types(name, buffer):
        raise ValueError(f"{name}: wanted dtype {buffer.dtype}, got {value.dtype}.")
    if _strides(value) != _strides(buffer):
        raise ValueError(
            f"{name}: wanted strides {buffer.stride()}, those of the weight, got {value.stride()}. "
            "Bring the model to the memory format that it was saved in."
        )


def _check_values(entries: dict[str, Any], group: ParamGroup) -> None:
    """Steps leave no other numbers behind: with these a component would stand still for ever, or leave its manifold."""
    for name, value in entries.items():
        if name == "exp_avg_sq" and not bool((value >= 0).all()):
            raise ValueError(f"{name}: wanted numbers >= 0, got others.")
        # Euclidean parameters take NaN and Inf as in torch.
        settled = settings.on_manifold(group) and not isinstance(group["manifold"], Collection)
        if settled and name in ("momentum_buffer", "exp_avg") and not bool(value.isfinite().all()):
            raise ValueError(f"{name}: wanted finite numbers, also as {value.dtype}, got NaN or Inf.")


def _saved_types(name: str, buffer: Tensor) -> tuple[torch.dtype, ...]:
    """The types that a saved ``buffer`` may have: its own, or that of a training in another one."""
    wide = (torch.float32, torch.float64)
    return {"master": (buffer.dtype,), "exp_avg_sq": wide}.get(name, DTYPES)


def _strides(tensor: Tensor) -> list[int]:
    """The strides that decide where elements are: those of dimensions longer than 1."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
