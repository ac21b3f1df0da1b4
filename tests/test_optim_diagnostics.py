"""What ``FGSGD(diagnostics=True)`` tells about a step, against the geometry worked out by hand."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from rich.console import Console
from torch import nn

from manifold_kernels import FGSGD, functional, param_groups, partition
from manifold_kernels.manifolds import Euclidean

#: float32 sums of some hundred products of numbers around 1, relative to the sum.
TOLERANCE = 100 * torch.finfo(torch.float32).eps


def layer_with_gradient() -> nn.Conv2d:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, bias=False)
    layer.weight.grad = torch.randn_like(layer.weight)
    return layer


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("scheme", ["pio", "single", "individual"])
@pytest.mark.parametrize("rule", [{"step_size": "general", "rho": 0.1, "curvature": 9.0}, {}, {"step_size": "none"}])
def test_norms_and_factors_of_a_collection(scheme: str, rule: dict, backend: str) -> None:
    layer = layer_with_gradient()
    groups = partition(layer, scheme, ["sphere", "oblique", "stiefel", None])
    kernels, gradients = (x.detach().double().reshape(-1, 3, 3) for x in (layer.weight, layer.weight.grad))
    optimizer = FGSGD(groups, lr=0.1, diagnostics=True, backend=backend, **rule)
    optimizer.step()
    found = optimizer.diagnostics()

    (group,) = groups
    one = group["assignments"][0]
    wanted = {}
    for number, members in enumerate(one.members()):
        manifold = group["manifold"].manifolds[int(one.manifolds[number])]
        scale = {"sphere": 2 / 4, "oblique": 2 / 12, "stiefel": 2 / 12}.get(manifold.name, 1.0) ** 0.5
        of = manifold if isinstance(manifold, Euclidean) else type(manifold)(scale)
        xi = functional.proj(of, kernels[members], gradients[members])
        # By the first component and the manifold, which tell groups apart.
        wanted[manifold.code, members.numel(), round(float(xi.norm()), 3)] = float(xi.norm())
    assert found.norm.numel() == len(wanted) == one.manifolds.numel()
    for code, size, norm, tau, component in zip(
        *(x.tolist() for x in (found.manifold, found.size, found.norm, found.tau, found.component)), strict=True
    ):
        (r,) = [
            value
            for (of, count, _), value in wanted.items()
            if (of, count) == (code, size) and abs(value - norm) < 2e-3
        ]
        assert norm == pytest.approx(r, rel=TOLERANCE)
        eq5 = max(1.0, r * r * max((0.2 + r) ** 2, 1 + 9 * (0.1 + r))) ** 0.5
        factor = {"general": eq5, "none": 1.0}.get(rule.get("step_size", ""), max(1.0, r * (2 + r)))
        assert tau == pytest.approx(factor, rel=2 * TOLERANCE)
        assert (component >= 0) == (size == 1)


def test_the_step_is_the_same_with_and_without() -> None:
    weights = []
    for diagnostics in (False, True):
        layer = layer_with_gradient()
        optimizer = FGSGD(partition(layer, "pio", ["sphere", None]), lr=0.1, momentum=0.9, diagnostics=diagnostics)
        optimizer.step()
        optimizer.step()
        weights.append(layer.weight.detach())
    assert torch.equal(*weights)


def test_what_was_not_stepped_is_nan() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3))
    optimizer = FGSGD(param_groups(model, "stiefel", grouping="individual"), lr=0.1, diagnostics=True)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[0].weight.grad[1, 0, 2, 2] = math.inf
    optimizer.step()
    found = optimizer.diagnostics()
    lost = found.norm.isnan()
    conv2 = found.parameter == 1
    assert bool(lost[conv2].all()) and bool(lost[found.parameter > 1].all())
    assert found.component[lost & (found.parameter == 0)].tolist() == [2]  # output 1, input 0 of two
    assert torch.equal(lost, found.tau.isnan())


def test_the_table_sums_up_by_parameter_and_manifold() -> None:
    layer = layer_with_gradient()
    optimizer = FGSGD(partition(layer, "pi", ["sphere", None]), lr=0.1, diagnostics=True)
    optimizer.step()
    console = Console(record=True, width=160, file=io.StringIO())
    found = optimizer.diagnostics()
    console.print(found.table(["weight"]))
    lines = [line for line in console.export_text().splitlines() if "weight" in line]
    # Four inputs with a group on each manifold; the largest R as printed.
    assert [line.split("│")[3].strip() for line in lines] == ["4", "4"]
    largest = {name: found.norm[found.manifold == code].max() for name, code in (("euclidean", 0), ("sphere", 1))}
    for line in lines:
        assert f"{largest[line.split('│')[2].strip()]:.3g}" == line.split("│")[5].strip()


def test_reading_what_is_not_there_is_refused() -> None:
    layer = layer_with_gradient()
    with pytest.raises(RuntimeError, match="diagnostics=True"):
        FGSGD(partition(layer, "pi", ["sphere"]), lr=0.1).diagnostics()
    optimizer = FGSGD(partition(layer, "pi", ["sphere"]), lr=0.1, diagnostics=True)
    with pytest.raises(RuntimeError, match="Call step"):
        optimizer.diagnostics()
    optimizer.step()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(RuntimeError, match="Call step"):
        optimizer.diagnostics()
    with pytest.raises(TypeError, match="diagnostics: wanted True or False"):
        FGSGD(partition(layer, "pi", ["sphere"]), lr=0.1, diagnostics=1)


def test_a_copy_diagnoses_on_its_own() -> None:
    layer = layer_with_gradient()
    optimizer = FGSGD(partition(layer, "pi", ["sphere"]), lr=0.1, diagnostics=True)
    optimizer.step()
    before = optimizer.diagnostics().norm
    other = copy.deepcopy(optimizer)
    other.param_groups[0]["params"][0].grad = torch.zeros_like(layer.weight)
    other.step()
    assert other.diagnostics().norm.tolist() == [0.0] * len(before)
    assert torch.equal(optimizer.diagnostics().norm, before)
