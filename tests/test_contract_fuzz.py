"""Untrusted plans and states: whatever stands in them is refused by name, or is harmless."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from stepping import group, hyper_table, start
from torch import Tensor, nn

from manifold_kernels import FGSGD, AdamG, ops, param_groups, partition
from manifold_kernels.manifolds import Oblique, Sphere, Stiefel
from manifold_kernels.plan import GROUP_COLUMNS, Plan
from manifold_kernels.views import Layout

if (missing := ops.extension_error()) is not None:
    pytest.skip(f"the compiled kernels are not there: {missing}", allow_module_level=True)

EDGES = [-(2**63), -(2**31), -1, 0, 1, 2, 3, 5, 7, 17, 2**31, 2**33, 2**62, 2**63 - 1]
numbers = st.one_of(st.sampled_from(EDGES), st.integers(-40, 40))
doubles = st.sampled_from([0.0, -1.0, math.nan, math.inf, 1e-320, 1e300, 0.5, 2.0])


def plan() -> tuple[Plan, list[Tensor]]:
    weights = [torch.rand(4, 3, 3, 3), torch.rand(5, 8), torch.rand(6)]
    listed = torch.tensor([0, 5, 11, 2])
    rest = torch.tensor([k for k in range(12) if k not in listed.tolist()])
    rows = [
        group(Stiefel(), components=listed, scale=torch.rand(4) + 0.5, step_size="general"),
        group(Sphere(), components=rest, individual=True),
        group(Oblique(), Layout("matrix"), parameter=1, step_size="general"),
        group("euclidean", parameter=2),
    ]
    return Plan.build(rows, weights), weights


@given(st.data())
@profile(max_examples=300)
def test_a_plan_with_wrong_numbers_is_refused_or_stays_in_its_tensors(data: st.DataObject) -> None:
    """One to three numbers of a plan become others. What passes the check steps within the weights: elements around
    them, in the same memory, keep their bits."""
    torch.set_num_threads(1)
    made, weights = plan()
    groups, components, scales = made.groups.clone(), made.components.clone(), made.scales.clone()
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from(["groups", "groups", "groups", "components", "scales"]))
        if where == "groups":
            row, column = data.draw(st.integers(0, len(groups) - 1)), data.draw(st.sampled_from(GROUP_COLUMNS))
            groups[row, GROUP_COLUMNS.index(column)] = data.draw(numbers)
        elif where == "components":
            components[data.draw(st.integers(0, len(components) - 1))] = data.draw(numbers)
        else:
            scales[data.draw(st.integers(0, len(scales) - 1))] = data.draw(doubles)
    spoiled = Plan(groups, components, scales)
    try:
        spoiled.check(weights)
    except ValueError as error:
        assert str(error)
        return
    run = start(weights, [group("euclidean", parameter=k) for k in range(3)], [{"momentum": 0.9}])
    around = [torch.full((weight.numel() + 64,), 7.0) for weight in weights]
    run.params = [a[32:-32].view(w.shape).copy_(w) for a, w in zip(around, weights, strict=True)]
    gradients = [torch.rand_like(weight) for weight in weights]
    with contextlib.suppress(ValueError, TypeError):  # numbers that are in range and do not fit each other
        torch.ops.manifold_kernels.step_(
            run.params, gradients, run.momenta, run.variances, run.steps, run.nonfinite,
            groups, components, scales, hyper_table([{"momentum": 0.9}]),
        )  # fmt: skip
    assert all(bool((a[:32] == 7).all()) and bool((a[-32:] == 7).all()) for a in around)


@pytest.mark.parametrize("numbers", [{"momentum": math.inf}, {"momentum": math.nan}])
@pytest.mark.parametrize("layout", [Layout("kernel"), Layout("matrix")])
def test_a_momentum_beyond_all_numbers_leaves_every_component(numbers: dict[str, float], layout: Layout) -> None:
    """Infinity times a buffer of zeros is NaN in every lane, empty ones included."""
    weights = [torch.rand(4, 3, 3, 3) if layout.view == "kernel" else torch.rand(5, 8)]
    for of in (Sphere(), Oblique(), Stiefel()):
        rows = [group(of, layout, step_size="general")]
        run = start(weights, rows, [{"momentum": 0.9}], fill=0.0)
        run.steps.fill_(1)
        made = Plan.build(rows, run.params)
        before = [p.clone() for p in run.params]
        torch.ops.manifold_kernels.step_(
            run.params, [torch.rand_like(p) for p in run.params], run.momenta, run.variances, run.steps, run.nonfinite,
            made.groups, made.components, made.scales, hyper_table([numbers]),
        )  # fmt: skip
        assert torch.equal(run.params[0], before[0]) and not run.momenta[0].any()
        assert run.nonfinite.item() == made.column("count").sum()


def trained() -> list[FGSGD | AdamG]:
    torch.manual_seed(0)
    model, other = nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))
    filters = nn.Parameter(nn.functional.normalize(torch.randn(4, 5), dim=1))
    optimizers = [
        FGSGD(param_groups(model, "stiefel"), lr=0.1, momentum=0.9, backend="cpu"),
        FGSGD(partition(other, "po", ["sphere", "oblique", None]), lr=0.1, momentum=0.9, backend="cpu"),
        AdamG([filters], lr=0.1, manifold="grassmann", backend="cpu"),
    ]
    for optimizer in optimizers:
        for entry in optimizer.param_groups:
            for parameter in entry["params"]:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return optimizers


def paths(value: object, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the leaves and the containers of plain data are."""
    inner: list[tuple[Any, ...]] = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        inner += paths(below, (*at, key))
    return inner


junk = st.one_of(
    st.none(),
    st.booleans(),
    numbers,
    doubles,
    st.sampled_from(["", "stiefel", b"", (), [], {}, [1.0], {"name": "stiefel"}, {"name": "sphere", "scale": -1}]),
    st.builds(
        lambda shape, dtype: torch.ones(shape, dtype=dtype),
        st.sampled_from([(), (1,), (3,), (4, 3, 3, 3), (2, 3), (0,), (4,), (1, 16)]),
        st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.bool, torch.complex64]),
    ),
    st.builds(lambda: torch.empty(4, 3, 3, 3, device="meta")),
    st.builds(lambda: torch.ones(1).expand(4, 3, 3, 3)),
    st.builds(lambda: torch.ones(4, 3, 3, 3).to_sparse()),
)


def spoiled(tensor: Tensor, data: st.DataObject) -> Tensor:
    """``tensor`` with another number at one place."""
    flat = tensor.clone().flatten()
    drawn = data.draw(doubles if flat.is_floating_point() else numbers)
    number = torch.tensor(drawn, dtype=torch.float64 if flat.is_floating_point() else torch.int64)
    flat[data.draw(st.integers(0, flat.numel() - 1))] = number.to(flat.dtype)  # infinite where it is too large
    return flat.view(tensor.shape)


@given(st.data())
@profile(max_examples=600)
def test_a_state_with_junk_in_it_is_refused_or_harmless(data: st.DataObject) -> None:
    """One entry or number of a saved state becomes something else, or is gone. Loading raises ``ValueError`` or
    ``TypeError`` and leaves the optimizer as it was, or the next steps are those of a state that is well-formed."""
    torch.set_num_threads(1)
    optimizer = trained()[data.draw(st.integers(0, 2))]
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    path = data.draw(st.sampled_from(paths(saved)))
    holder = saved
    for key in path[:-1]:
        holder = holder[key]
    found = holder[path[-1]]
    if isinstance(found, Tensor) and found.numel() and data.draw(st.booleans()):
        holder[path[-1]] = spoiled(found, data)
    elif data.draw(st.booleans()) and isinstance(holder, dict):
        del holder[path[-1]]
    else:
        holder[path[-1]] = data.draw(junk)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            optimizer.load_state_dict(saved)
        except (ValueError, TypeError) as error:
            refusal = str(error)
        else:
            refusal = None
    assert not said  # junk is looked at before it is used, which torch may warn of
    if refusal is not None:
        assert refusal
        same_data(optimizer.state_dict(), before)
        return
    for entry in optimizer.param_groups:
        for parameter in entry["params"]:
            parameter.grad = torch.randn_like(parameter)
    try:
        optimizer.step()
    except (ValueError, TypeError):
        return  # a number that is none: said at the step, before anything is written
    assert optimizer.violation() < 1e-5


def same_data(one: object, other: object) -> None:
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor) and torch.equal(one, other)
    elif isinstance(one, dict):
        assert isinstance(other, dict) and one.keys() == other.keys()
        for key in one:
            same_data(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert isinstance(other, (list, tuple)) and len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            same_data(mine, theirs)
    else:
        assert one == other
