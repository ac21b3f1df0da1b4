"""Which weights are scale-invariant: what is found is checked by rescaling weights and looking at the outputs."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from manifold_kernels.manifolds import Grassmann, ScaleInvariant
from manifold_kernels.norm_detection import NORMS, Normalization, find_scale_invariant, verify_scale_invariant
from manifold_kernels.routing import param_groups

# Rescaling in float64 moves the outputs by the roundings of a few layers, each eps = 2e-16 times a condition number
# that the normalisations keep below 1e4; a weight that is not scale-invariant moves them by about the factor, 1.
STILL = 1e-9
MOVED = 1e-4


class Residual(nn.Module):
    """conv1 and conv2 are normalised; the output of conv3 is added to something before it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(4)
        self.conv3 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        y = torch.relu(self.norm2(self.conv2(x)))
        y = self.norm3(self.conv3(y) + x)
        return self.fc(torch.relu(y).mean((2, 3)))


class Branching(nn.Module):
    """Control flow that depends on data, which torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.norm1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.norm2 = nn.BatchNorm2d(4)  # of another size: not what follows conv2
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        return self.fc(self.conv2(torch.relu(self.norm1(self.conv1(x)))).mean((2, 3)))


class PreActivation(nn.Module):
    """Registered as if the norm came after the convolution, called the other way round."""

    def __init__(self, traceable: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.traceable = traceable

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.sum() > 1e9:
            return x
        return self.conv(torch.relu(self.norm(x)))


class ChannelsLast(nn.Module):
    """As in ConvNeXt: the layer norm of the channels after a permutation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x).permute(0, 2, 3, 1)))


class Twice(nn.Module):
    """One convolution with two uses; the second one is normalised only on request."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.both = both

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(torch.relu(self.norm(self.conv(x))))
        return self.norm(y) if self.both else y


class UsedOutside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv.weight.square().sum()


IMAGE = (5, 3, 6, 6)

# name: (model, shape of the input, {weight: rows})
ZOO = {
    "batch norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), IMAGE, {"0.weight": 1}),
    "batch norm, dropout": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Dropout(0.3), nn.BatchNorm2d(4)),
        IMAGE,
        {"0.weight": 1},
    ),
    "batch norm, bias and dropout": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.3), nn.BatchNorm2d(4)),
        IMAGE,
        {},
    ),
    "batch norm after ReLU and pooling": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(4)),
        IMAGE,
        {"0.weight": 1},
    ),
    "batch norm after identity": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.BatchNorm2d(4)),
        IMAGE,
        {"0.weight": 1},
    ),
    "batch norm after sigmoid": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Sigmoid(), nn.BatchNorm2d(4)),
        IMAGE,
        {},
    ),
    "instance norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4)), IMAGE, {"0.weight": 1}),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.GroupNorm(2, 8)),
        IMAGE,
        {"0.weight": 4},
    ),
    "group norm and bias": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)), IMAGE, {}),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 3)),
        (5, 6),
        {"0.weight": 8},
    ),
    "layer norm and bias": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8)), (5, 6), {}),
    "rms norm": (lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.RMSNorm(8)), (5, 6), {"0.weight": 8}),
    "layer norm after a permutation": (ChannelsLast, IMAGE, {"conv.weight": 4}),
    "linear and batch norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), (5, 6), {"0.weight": 1}),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
        (5, 4, 6, 6),
        {"0.weight": 1},
    ),
    "transposed, group norm": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=2, bias=False), nn.GroupNorm(4, 8)),
        (5, 4, 6, 6),
        {"0.weight": 2},
    ),
    "transposed, group norm across groups": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=4, bias=False), nn.GroupNorm(2, 8)),
        (5, 4, 6, 6),
        {},
    ),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv1d(4, 8, 3, groups=4), nn.BatchNorm1d(8)),
        (5, 4, 9),
        {"0.weight": 1},
    ),
    "no norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), IMAGE, {}),
    "residual": (Residual, IMAGE, {"conv1.weight": 1, "conv2.weight": 1}),
    "norm before the convolution": (lambda: PreActivation(traceable=True), IMAGE, {}),
    "shared, one use normalised": (lambda: Twice(both=False), IMAGE, {}),
    "shared, both uses normalised": (lambda: Twice(both=True), IMAGE, {"conv.weight": 1}),
    "used outside of its layer": (UsedOutside, IMAGE, {}),
}


def outputs_of(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def rescaled(layer: nn.Module, outputs: slice) -> None:
    """Double all weights into the neurons ``outputs``, by plain indexing."""
    weight = layer.weight.data
    if isinstance(layer, nn.ConvTranspose2d):
        per_group = weight.shape[1]
        for output in range(outputs_of(layer))[outputs]:
            inputs = weight.shape[0] // layer.groups
            group = output // per_group
            weight[group * inputs : (group + 1) * inputs, output % per_group] *= 2
    else:
        weight[outputs] *= 2


def change(model: nn.Module, name: str, outputs: slice, x: Tensor) -> float:
    """How much doubling these neurons' weights moves the output of the model in training."""
    results = []
    for double in (False, True):
        twin = copy.deepcopy(model).double()
        for module in twin.modules():
            if isinstance(module, NORMS):
                module.eps = 1e-30
        if double:
            rescaled(twin.get_submodule(name.rpartition(".")[0]), outputs)
        torch.manual_seed(1)
        results.append(twin(x).detach())
    return float((results[0] - results[1]).abs().max() / results[0].abs().max())


@pytest.mark.parametrize("name", ZOO)
def test_what_is_found_is_scale_invariant_and_the_rest_is_not(name: str) -> None:
    torch.manual_seed(0)
    build, shape, expected = ZOO[name]
    model, x = build(), torch.randn(shape, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all of these can be traced
        found = find_scale_invariant(model)
    assert {weight: normalization.rows for weight, normalization in found.items()} == expected
    assert all(normalization.found_by == "graph" for normalization in found.values())
    for weight, rows in expected.items():
        layer = model.get_submodule(weight.rpartition(".")[0])
        for first in range(0, outputs_of(layer), rows):
            assert change(model, weight, slice(first, first + rows), x) <= STILL
        if rows > 1:  # and less than one vector is not invariant: the vectors are no larger than they must be
            assert change(model, weight, slice(0, 1), x) >= MOVED
    for weight, module in model.named_modules():
        if hasattr(module, "weight") and not isinstance(module, NORMS) and f"{weight}.weight" not in expected:
            assert change(model, f"{weight}.weight", slice(0, 1), x) >= MOVED
    assert verify_scale_invariant(model, x.float()).keys() == expected.keys()


def test_param_groups_follow_the_normalisations() -> None:
    model = Residual()
    groups = param_groups(model, "scale_invariant", euclidean={"lr": 0.1}, lr=1.0)
    assert [group["manifold"] for group in groups] == [ScaleInvariant(), None]
    assert groups[0]["names"] == ["conv1.weight", "conv2.weight"] and groups[0]["view"] == "filter"
    assert "norm1" in groups[0]["notes"]["conv1.weight"]
    assert "add" in groups[1]["notes"]["conv3.weight"] and "output" in groups[1]["notes"]["fc.weight"]
    routed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(routed) == sorted(id(parameter) for parameter in model.parameters())


def test_rows_of_group_and_layer_norm() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(4, 8)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6, bias=False), nn.LayerNorm(6), nn.Linear(6, 2)),
    )
    groups = param_groups(model, "scale_invariant")
    assert {group["rows"]: group["names"] for group in groups[:-1]} == {4: ["0.weight"], 6: ["7.weight"]}
    assert "bias" in groups[-1]["notes"]["3.weight"]


def test_grassmann_weights_become_unit_vectors() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    groups = param_groups(model, Grassmann())
    assert groups[0]["names"] == ["0.weight"]
    # One rounding of every entry to float32 moves a norm by at most eps/2.
    norms = model[0].weight.detach().double().flatten(1).norm(dim=1)
    assert (norms - 1).abs().max() <= torch.finfo(torch.float32).eps


def test_scale_invariant_weights_are_not_moved() -> None:
    model = Residual()
    before = model.conv1.weight.clone()
    param_groups(model, "scale_invariant")
    assert torch.equal(model.conv1.weight, before)


def test_rules_speak_for_weights_whose_norm_is_not_seen() -> None:
    model = Residual()
    with pytest.raises(ValueError, match=r"conv3\.weight cannot lie on scale_invariant: it feeds add"):
        param_groups(model, None, rules={"conv3": "scale_invariant"})
    groups = param_groups(model, "stiefel", rules={"conv3": {"manifold": "scale_invariant", "rows": 2}})
    (psi,) = [group for group in groups if group["manifold"] == ScaleInvariant()]
    assert psi["names"] == ["conv3.weight"] and psi["rows"] == 2
    with pytest.raises(ValueError, match="rows"):
        param_groups(model, None, rules={"conv3": {"manifold": "scale_invariant", "rows": 3}})  # 4 outputs
    with pytest.raises(ValueError, match="view: wanted 'filter'"):
        param_groups(model, "scale_invariant", view="kernel")
    with pytest.raises(ValueError, match="wanted a trainable weight"):
        param_groups(nn.Sequential(nn.Conv2d(3, 4, 3)), "scale_invariant")


def test_models_that_cannot_be_traced_are_read_in_order_of_registration() -> None:
    model = Branching()
    with pytest.warns(RuntimeWarning, match="torch.fx cannot trace Branching"):
        found = find_scale_invariant(model)
    assert found == {"conv1.weight": Normalization("norm1", 1, "order")}
    with pytest.warns(RuntimeWarning):
        groups = param_groups(model, "scale_invariant")
    assert "by order of registration" in groups[0]["notes"]["conv1.weight"]
    with pytest.warns(RuntimeWarning):
        assert list(verify_scale_invariant(model, torch.randn(IMAGE))) == ["conv1.weight"]


def test_verification_finds_a_wrong_guess() -> None:
    assert find_scale_invariant(PreActivation(traceable=True)) == {}
    model = PreActivation(traceable=False)
    state = copy.deepcopy(model.state_dict())
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match=r"conv\.weight \(behind norm"):
        verify_scale_invariant(model, torch.randn(IMAGE))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_batch_norm_with_fixed_statistics_normalises_nothing() -> None:
    model = Residual()
    model.norm1.eval()
    assert list(find_scale_invariant(model)) == ["conv2.weight"]
    assert list(verify_scale_invariant(model, torch.randn(IMAGE))) == ["conv2.weight"]
    # A whole model in eval mode is about to be trained.
    assert list(find_scale_invariant(Residual().eval())) == ["conv1.weight", "conv2.weight"]


def test_tied_weights_need_a_normalisation_at_every_use() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.ReLU())
    assert list(find_scale_invariant(model)) == ["0.weight"]
    model[2].weight = model[0].weight
    assert find_scale_invariant(model) == {}
