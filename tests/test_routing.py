"""Routing of models: every parameter once, each on the manifold that was asked for, nothing silently left off."""

from __future__ import annotations

import io
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

from manifold_kernels.manifolds import Oblique, Sphere, Stiefel
from manifold_kernels.optim import FGSGD, PSISGD
from manifold_kernels.routing import param_groups
from manifold_kernels.routing_table import print_routing_table, routing_table

# A float32 weight is projected in float64 and rounded once: each entry is off by at most eps/2 of itself, and so a
# squared norm or a Gram entry of a matrix with columns of norm s by at most eps s^2 to first order; 2 eps leaves room.
TOLERANCE = 2 * torch.finfo(torch.float32).eps


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = Block(3, 8)
        self.layer2 = Block(8, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.randn(1, 6, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position
        x = self.norm(x + self.attention(x, x, x)[0])
        return self.head(x + self.down(torch.relu(self.up(x))))


def group_of(groups: list[dict], name: str) -> dict:
    (found,) = [group for group in groups if name in group["names"]]
    return found


def weight_of(groups: list[dict], name: str) -> np.ndarray:
    group = group_of(groups, name)
    return group["params"][group["names"].index(name)].detach().double().numpy()


def note(groups: list[dict], name: str) -> str:
    return group_of(groups, name)["notes"].get(name, "")


def assert_all_once(model: nn.Module, groups: list[dict]) -> None:
    routed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(routed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    named = dict(model.named_parameters())
    for group in groups:
        assert all(named[name] is parameter for name, parameter in zip(group["names"], group["params"], strict=True))


def norms(weight: np.ndarray, axes: int | tuple[int, ...]) -> np.ndarray:
    return np.sqrt((weight**2).sum(axes))


def assert_stiefel(matrices: np.ndarray, scale: float) -> None:
    gram = matrices.swapaxes(-1, -2) @ matrices / scale**2
    assert np.abs(gram - np.eye(gram.shape[-1])).max() <= TOLERANCE


def test_resnet_is_routed_by_layer_type() -> None:
    model = ResNet()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = param_groups(model, "stiefel", euclidean={"lr": 0.25, "weight_decay": 5e-4}, lr=1.0)
    assert_all_once(model, groups)
    # Fan scale of C inputs and 3x3 kernels, and of filters: the norms that He initialisation gives.
    assert_stiefel(weight_of(groups, "layer1.conv1.weight"), math.sqrt(2 / (3 * 3)))
    assert_stiefel(weight_of(groups, "layer2.conv2.weight"), math.sqrt(2 / (16 * 3)))
    assert group_of(groups, "layer1.conv1.weight") is group_of(groups, "layer2.conv2.weight")
    # 1x1 kernels would be frozen: filters instead, and it is said.
    pointwise = group_of(groups, "layer2.shortcut.0.weight")
    assert pointwise["view"] == "filter" and pointwise["lr"] == 1.0
    assert "not kernel" in note(groups, "layer2.shortcut.0.weight")
    filters = norms(weight_of(groups, "layer2.shortcut.0.weight"), (1, 2, 3))
    assert np.abs(filters / math.sqrt(2) - 1).max() <= TOLERANCE
    rest = groups[-1]
    assert rest["manifold"] is None and rest["lr"] == 0.25 and rest["weight_decay"] == 5e-4
    for name in ("fc.weight", "fc.bias", "layer1.bn1.weight"):
        assert name in rest["names"] and torch.equal(dict(model.named_parameters())[name], before[name])


def test_projection_goes_to_the_nearest_point() -> None:
    model = nn.Conv2d(4, 6, 3)
    before = model.weight.detach().double().numpy()
    param_groups(model, Stiefel(0.5))
    u, _, vt = np.linalg.svd(before)
    # The polar factor moves by 2/(sigma_2 + sigma_3) times a perturbation; float64 throughout, then rounded to float32.
    assert np.abs(model.weight.detach().double().numpy() - 0.5 * u @ vt).max() <= TOLERANCE


def test_manifold_objects_keep_their_scale_and_names_mean_fan() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3))
    groups = param_groups(model, Sphere(), rules={"1": "sphere"})
    assert norms(weight_of(groups, "0.weight"), (2, 3)) == pytest.approx(1, abs=TOLERANCE)
    assert norms(weight_of(groups, "1.weight"), (2, 3)) == pytest.approx(math.sqrt(2 / 3), abs=TOLERANCE)


def test_transposed_convolution_swaps_inputs_and_outputs() -> None:
    model = nn.ConvTranspose2d(6, 4, 3, groups=2)  # weight (6, 2, 3, 3): 2 groups of 3 inputs and 2 outputs
    groups = param_groups(model, Stiefel(), view="filter", init="random", generator=torch.Generator().manual_seed(0))
    assert groups[0]["transposed"] and groups[0]["channel_groups"] == 2
    weight = weight_of(groups, "weight")
    for group in range(2):
        for output in range(2):
            filter_ = weight[3 * group : 3 * group + 3, output]
            assert norms(filter_, (0, 1, 2)) == pytest.approx(1, abs=TOLERANCE)


def test_one_and_three_dimensional_convolutions() -> None:
    model = nn.ModuleDict({"c1": nn.Conv1d(4, 5, 3), "c3": nn.Conv3d(2, 3, 3), "t1": nn.ConvTranspose1d(5, 4, 3)})
    groups = param_groups(model, Sphere(2.0), rules={"c3": {"manifold": Sphere(2.0), "view": "filter"}})
    assert_all_once(model, groups)
    assert norms(weight_of(groups, "c1.weight"), (1, 2)) == pytest.approx(2, rel=TOLERANCE)
    assert norms(weight_of(groups, "c3.weight"), (1, 2, 3, 4)) == pytest.approx(2, rel=TOLERANCE)
    assert norms(weight_of(groups, "t1.weight"), (0, 2)) == pytest.approx(2, rel=TOLERANCE)


def test_view_that_a_layer_does_not_have_gives_way_to_its_own() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(8, 4), nn.Conv3d(2, 2, 3))
    groups = param_groups(model, "sphere", linear="stiefel", view="kernel")
    assert [group_of(groups, f"{i}.weight")["view"] for i in (0, 1, 3, 4)] == ["kernel", "filter", "matrix", "filter"]
    assert "not kernel" in note(groups, "3.weight") and note(groups, "0.weight") == ""


def test_depthwise_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(8, 8, (1, 3)))
    groups = param_groups(model, Oblique())
    assert group_of(groups, "0.weight")["view"] == "kernel"
    assert norms(weight_of(groups, "0.weight"), 2) == pytest.approx(1, abs=TOLERANCE)
    # A single element per filter can only be +s or -s: left Euclidean, and said.
    assert group_of(groups, "1.weight")["manifold"] is None and "stays Euclidean" in note(groups, "1.weight")
    # Columns of 1x3 kernels are single elements; filters are not.
    assert group_of(groups, "2.weight")["view"] == "filter"
    with pytest.raises(ValueError, match=r"1\.weight cannot lie on oblique"):
        param_groups(model, None, rules={"1": Oblique()})
    with pytest.raises(ValueError, match=r"rules\['1\*'\].*constrains a weight"):
        param_groups(model, None, rules={"1*": Oblique()})
    # A rule for what is around it does not insist on it.
    groups = param_groups(nn.ModuleDict({"block": model}), None, rules={"block": Oblique()})
    assert [group["names"][0] for group in groups] == ["block.0.weight", "block.2.weight", "block.0.bias"]


def test_transformer_embeddings_and_in_projections_need_a_name() -> None:
    model = Transformer()
    groups = param_groups(model, None, rules={"*": Stiefel()})
    assert_all_once(model, groups)
    for name in ("position", "attention.in_proj_weight"):
        assert group_of(groups, name)["manifold"] is None
    for name in ("attention.out_proj.weight", "up.weight", "down.weight", "embed.weight"):  # embed is tied to head
        assert group_of(groups, name)["manifold"] == Stiefel()
    assert_stiefel(weight_of(groups, "up.weight"), 1)  # (16, 8), n < p as (C, D): orthonormal rows of the transpose
    assert_stiefel(weight_of(groups, "down.weight").T, 1)

    model = Transformer()
    groups = param_groups(model, None, rules={"embed": Oblique(), "*.in_proj_weight": Stiefel()})
    # Columns of the matrix view are outputs: the vectors of the tokens.
    assert norms(weight_of(groups, "embed.weight"), 1) == pytest.approx(1, abs=TOLERANCE)
    assert_stiefel(weight_of(groups, "attention.in_proj_weight"), 1)  # (24, 8)
    assert group_of(groups, "up.weight")["manifold"] is None


def test_tied_weights() -> None:
    model = Transformer()
    groups = param_groups(model, None, linear="oblique", rules={"head": Sphere()})
    assert group_of(groups, "embed.weight")["manifold"] == Sphere()  # listed once, under its first name
    for rules in ({"head": Sphere(), "embed": Stiefel()}, {"head": Sphere(), "embed": None}):
        with pytest.raises(ValueError, match=r"head\.weight: shares its weight with embed\.weight"):
            param_groups(model, None, rules=rules)
    # A shared module is one module with two names.
    conv = nn.Conv2d(3, 3, 3)
    twice = nn.ModuleDict({"a": conv, "b": conv})
    groups = param_groups(twice, "stiefel", rules={"b": "oblique"})
    assert_all_once(twice, groups)
    assert group_of(groups, "a.weight")["manifold"] == Oblique("fan")
    # The same tensor as convolution and transposed convolution: filters differ, a rule decides.
    auto = nn.ModuleDict({"encode": nn.Conv2d(4, 6, 3, bias=False), "decode": nn.ConvTranspose2d(6, 4, 3, bias=False)})
    auto["decode"].weight = auto["encode"].weight
    with pytest.raises(ValueError, match="shares its weight"):
        param_groups(auto, "sphere")
    groups = param_groups(auto, Sphere(), view="filter", rules={"decode": Sphere()})
    assert groups[0]["transposed"]
    assert norms(weight_of(groups, "encode.weight"), (0, 2, 3)) == pytest.approx(1, abs=TOLERANCE)


def test_last_rule_decides() -> None:
    model = ResNet()
    rules = {
        "layer2": Oblique(),
        "layer2.shortcut.*": None,
        "layer?.conv1": {"manifold": Sphere(), "grouping": "individual"},
        "fc": {"manifold": "stiefel", "lr": 0.5, "retraction": "polar"},
        "*.bias": {"weight_decay": 0.0},
    }
    groups = param_groups(model, Stiefel(), rules=rules, lr=2.0, euclidean={"weight_decay": 0.1, "lr": 0.1})
    assert_all_once(model, groups)
    found = {name: group_of(groups, name) for name, _ in model.named_parameters()}
    assert found["layer1.conv2.weight"]["manifold"] == Stiefel()
    assert found["layer2.conv2.weight"]["manifold"] == Oblique()
    assert found["layer2.shortcut.0.weight"]["manifold"] is None
    for name in ("layer1.conv1.weight", "layer2.conv1.weight"):
        assert found[name]["manifold"] == Sphere() and found[name]["grouping"] == "individual"
    assert found["fc.weight"]["lr"] == 0.5 and found["fc.weight"]["retraction"] == "polar"
    assert found["layer2.conv2.weight"]["lr"] == 2.0
    assert found["fc.bias"]["weight_decay"] == 0.0 and found["fc.bias"]["lr"] == 0.1
    assert found["layer2.bn1.weight"]["weight_decay"] == 0.1


def test_options_alone_keep_the_manifold() -> None:
    groups = param_groups(ResNet(), Stiefel(), rules={"layer1": {"lr": 0.3, "view": "matrix"}})
    assert group_of(groups, "layer1.conv1.weight")["manifold"] == Stiefel()
    assert group_of(groups, "layer1.conv1.weight")["view"] == "matrix"
    assert group_of(groups, "layer2.conv1.weight")["view"] == "kernel"
    norm = group_of(groups, "layer1.bn1.weight")
    assert norm["manifold"] is None and norm["lr"] == 0.3 and "view" not in norm


def test_untrained_parameters_are_left_alone() -> None:
    model = ResNet()
    model.layer1.requires_grad_(False)
    before = model.layer1.conv1.weight.clone()
    assert_all_once(model, param_groups(model, "stiefel"))
    assert torch.equal(model.layer1.conv1.weight, before)
    with pytest.raises(ValueError, match="not trained"):
        param_groups(model, None, rules={"layer1.conv1": "stiefel"})


def test_random_initialisation() -> None:
    def drawn(seed: int, fill: float, dtype: torch.dtype = torch.float64) -> Tensor:
        model = nn.Conv2d(3, 4, 3, dtype=dtype)
        nn.init.constant_(model.weight, fill)
        param_groups(model, Stiefel(), init="random", generator=torch.Generator().manual_seed(seed))
        return model.weight.detach()

    assert_stiefel(drawn(0, 0.0).numpy(), 1)
    assert torch.equal(drawn(0, 0.0), drawn(0, 1.0)) and not torch.equal(drawn(0, 0.0), drawn(1, 0.0))
    # The same point in another type: the numbers are drawn in float64. The rounding of the draw, at most eps/2 of
    # numbers below 5 s, is magnified by 2/(sigma_2 + sigma_3), here below 20.
    assert (drawn(0, 0.0) - drawn(0, 0.0, torch.float32)).abs().max() <= 100 * TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rules": {"layer9.*": "sphere"}}, "matches nothing"),
        ({"rules": {"layer1.bn1": "sphere"}}, "two or more dimensions"),
        ({"rules": {"fc.bias": "sphere"}}, "two or more dimensions"),
        ({"rules": {"fc": "oblique", "f*": "sphere"}}, "later rule"),
        ({"rules": {"fc": {"view": "filter"}}}, "without a manifold"),
        ({"rules": {"fc": "spehre"}}, "spehre"),
        ({"rules": {"fc": {"manifold": None, "view": "matrix"}}}, "view"),
        ({"rules": {"fc": {"manifold": "sphere", "rows": 2}}}, "rows is for"),
        ({"rules": {"fc": {"manifold": "sphere", "retraction": "qr"}}}, "retraction"),
        ({"veiw": "filter"}, "veiw"),
        ({"view": "flat"}, "flat"),
        ({"rows": 2}, "rows"),
        ({"euclidean": {"grouping": "layer"}}, "grouping"),
        ({"init": "orthogonal"}, "orthogonal"),
        ({"generator": torch.Generator()}, "generator"),
    ],
)
def test_refusals_leave_the_model_as_it_was(arguments: dict, message: str) -> None:
    model = ResNet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        param_groups(model, "stiefel", **arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_without_a_weight_to_constrain() -> None:
    mlp = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="wanted a trainable weight to constrain"):
        param_groups(mlp, "stiefel")
    assert_all_once(mlp, param_groups(mlp, None))  # asked for: a Euclidean baseline


def test_weights_that_cannot_be_projected() -> None:
    for module in (nn.LazyConv2d(4, 3), nn.Conv2d(3, 4, 3, device="meta")):
        with pytest.raises(ValueError, match="wanted an initialised parameter"):
            param_groups(module, "stiefel")
    for value in (0.0, math.nan):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
        nn.init.constant_(model[1].weight, value)
        before = model[0].weight.clone()
        with pytest.raises(ValueError, match=r"1\.weight.*zero or not finite"):
            param_groups(model, "sphere")
        assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.orthogonal, weight_norm, prune.identity]
)
def test_computed_weights_raise_unless_left_without_a_manifold(wrap: object) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.warns(FutureWarning) if wrap is weight_norm else nullcontext():
        wrap(model[1], *(["weight"] if wrap is prune.identity else []))
    with pytest.raises(ValueError, match=r"1\.weight: .* parametrization"):
        param_groups(model, "sphere")
    assert_all_once(model, param_groups(model, "sphere", rules={"1": None}))


def test_table_tells_where_every_parameter_went() -> None:
    model = ResNet()
    groups = param_groups(model, "stiefel", rules={"fc": {"manifold": Sphere(3.0), "grouping": "individual"}})
    file = io.StringIO()
    print_routing_table(groups, Console(file=file, width=200))
    lines = file.getvalue().splitlines()
    for name, _ in model.named_parameters():
        assert sum(f" {name} " in line for line in lines) == 1
    (conv,) = [line for line in lines if " layer2.conv2.weight " in line]
    assert "stiefel" in conv and "0.2041 (fan)" in conv and "256 x 3x3" in conv
    (fc,) = [line for line in lines if " fc.weight " in line]
    assert "sphere" in fc and " 3 " in fc and "1 x 16x5" in fc and "individual" in fc
    (pointwise,) = [line for line in lines if " layer1.shortcut.0.weight " in line]
    assert "not kernel" in pointwise
    with pytest.raises(ValueError, match="names"):
        routing_table([{"params": []}])


def test_groups_go_straight_into_an_optimizer() -> None:
    torch.manual_seed(0)
    model = ResNet()
    groups = param_groups(model, "stiefel", linear="oblique", euclidean={"weight_decay": 1e-4, "lr": 0.01})
    optimizer = FGSGD(groups, lr=0.1, momentum=0.9, backend="reference")
    assert [group["names"] for group in optimizer.param_groups] == [group["names"] for group in groups]
    before = model.layer1.conv1.weight.clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 6, 6)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(model.layer1.conv1.weight, before)
    assert_stiefel(weight_of(optimizer.param_groups, "layer2.conv2.weight"), math.sqrt(2 / (16 * 3)))
    optimizer.load_state_dict(optimizer.state_dict())
    print_routing_table(optimizer.param_groups, Console(file=io.StringIO()))
    # Names of ours are no names of torch's: groups without names can still be added.
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


def test_groups_go_straight_into_psi_sgd() -> None:
    torch.manual_seed(0)
    model = ResNet()
    optimizer = PSISGD(param_groups(model, "scale_invariant", euclidean={"lr": 0.1}), lr=1.0, backend="reference")
    before = model.layer1.conv1.weight.clone()
    model(torch.randn(4, 3, 6, 6)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.layer1.conv1.weight, before)
