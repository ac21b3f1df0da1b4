"""Collections of products of manifolds: every scheme by its properties, in steps, in checkpoints and in messages."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

from manifold_kernels import FGSGD, PSISGD, Assignment, Collection, param_groups, partition, print_routing_table
from manifold_kernels.manifolds import Euclidean, Oblique, Sphere, Stiefel
from manifold_kernels.optim import ManifoldOptimizer
from manifold_kernels.partition_report import assignments, draw_partition, partition_table

FOUR = (Sphere(), Oblique(), Stiefel(), Euclidean())


def near_equal(counts: Tensor) -> bool:
    return int(counts.max() - counts.min()) <= 1


def per_manifold(one: Assignment, manifolds: int) -> Tensor:
    return torch.bincount(one.grid().flatten(), minlength=manifolds)


#: Collection("pio", (Sphere(), Stiefel()), seed=7).draw("layer1.conv.weight", 4, 4), written down once.
GOLDEN_GROUPS = [[4, 5, 6, 7], [4, 5, 6, 7], [1, 0, 1, 0], [2, 3, 3, 2]]
GOLDEN_MANIFOLDS = [0, 1, 1, 0, 0, 1, 0, 1]


# -- the schemes ------------------------------------------------------------------------------------------------------


@given(
    outputs=st.integers(1, 13),
    inputs=st.integers(1, 13),
    count=st.integers(1, 4),
    subsets=st.none() | st.integers(1, 6),
    scheme=st.sampled_from(["po", "pi", "pio", "single", "individual"]),
    seed=st.integers(0, 5),
    shared=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_schemes_have_their_properties(
    outputs: int, inputs: int, count: int, subsets: int | None, scheme: str, seed: int, shared: bool
) -> None:
    subsets = None if scheme == "individual" else subsets
    of = Collection(scheme, FOUR[:count], seed, subsets, shared and scheme in ("po", "pi"))
    one = of.draw("w", outputs, inputs)
    # Every component in exactly one group, and the groups' lists are those of the grid.
    members = one.members()
    assert torch.cat(members).sort().values.equal(torch.arange(outputs * inputs))
    assert all(bool((one.groups.flatten()[own] == group).all()) for group, own in enumerate(members))
    assert one.grid().unique().numel() <= count
    d = [set((own // inputs).tolist()) for own in members]
    c = [set((own % inputs).tolist()) for own in members]
    parts = subsets or count
    if scheme in ("po", "pi"):
        along, channels, length = (d, outputs, inputs) if scheme == "po" else (c, inputs, outputs)
        assert all(len(channel) == 1 for channel in along)  # a group stays within its output, or its input
        sizes = one.sizes()
        for channel in range(channels):
            own = torch.tensor([channel in found for found in along])
            assert int(own.sum()) == min(parts, length)
            assert near_equal(sizes[own])
            assert near_equal(torch.bincount(one.manifolds[own], minlength=count)) or length < parts
    elif scheme == "single":
        assert near_equal(per_manifold(one, count))
        for manifold in range(count):
            sizes = one.sizes()[one.manifolds == manifold]
            total = int(per_manifold(one, count)[manifold])
            assert sizes.numel() == min(subsets or 1, total)
            assert not sizes.numel() or near_equal(sizes)
    elif scheme == "individual":
        assert one.sizes().unique().tolist() == [1]
        assert near_equal(per_manifold(one, count))
    elif outputs > 1:
        columns = [found for found, own in zip(c, members, strict=True) if len(found) == 1 and own.numel() > 1]
        rows = [found for found in d if len(found) == 1]
        assert len(rows) + len(columns) >= len(members)
        # The outputs that are split as PO: about half, and none of their components is in a group of the others.
        po = {next(iter(found)) for found in d[: -inputs or None]}
        assert len(po) in (outputs // 2, outputs - outputs // 2)
        pi = set(range(outputs)) - po
        assert all(found == pi for found in d[-inputs:])
        assert near_equal(torch.bincount(one.manifolds[-inputs:], minlength=count))


@pytest.mark.parametrize(("scheme", "groups"), [("pio", 10), ("pi", 8), ("po", 12)])
def test_example_1_of_the_paper(scheme: str, groups: int) -> None:
    """[FG] Example 1, 4 inputs, 6 outputs, Sp and St. PIO: 6 groups of 2, 4 of 3, 5 on each; PI: 4 + 4; PO: 6 + 6."""
    one = Collection(scheme, (Sphere(), Stiefel())).draw("conv.weight", outputs=6, inputs=4)
    assert one.manifolds.bincount().tolist() == [groups // 2, groups // 2]
    wanted = {"pio": [2] * 6 + [3] * 4, "pi": [3] * 8, "po": [2] * 12}[scheme]
    assert one.sizes().sort().values.tolist() == wanted
    assert per_manifold(one, 2).tolist() == [12, 12]


def test_the_draw_is_what_it_always_was() -> None:
    """A golden draw: it must not change with versions of torch, numpy or Python, nor with the global generators."""
    torch.manual_seed(1)
    one = Collection("pio", (Sphere(), Stiefel()), seed=7).draw("layer1.conv.weight", outputs=4, inputs=4)
    assert one.groups.tolist() == GOLDEN_GROUPS
    assert one.manifolds.tolist() == GOLDEN_MANIFOLDS


def test_layers_and_seeds_draw_differently_and_other_layers_do_not_matter() -> None:
    of = Collection("pio", FOUR)
    first = of.draw("a", 12, 12)
    assert of.draw("a", 12, 12) == first
    assert of.draw("b", 12, 12) != first
    assert Collection("pio", FOUR, seed=1).draw("a", 12, 12) != first


@pytest.mark.parametrize("manifolds", [3, 4])
def test_remainders_reach_every_manifold(manifolds: int) -> None:
    """A depthwise layer and one of 3 inputs: whoever gets the remainder is drawn, so that nobody always does.

    64 outputs deal one of M manifolds each: a manifold's count is binomial with mean 64/M and deviation sqrt(64 q) with
    q = (1 - 1/M)/M, at most 3.8; five deviations have odds of 1e-6.
    """
    one = Collection("po", FOUR[:manifolds]).draw("w", outputs=64, inputs=1)
    counts = per_manifold(one, manifolds)
    assert bool(((counts - 64 / manifolds).abs() < 19).all()) and int(counts.min()) > 0
    assert per_manifold(Collection("po", FOUR).draw("w", outputs=64, inputs=3), 4).min() > 0


def test_shared_subsets_are_those_of_every_channel() -> None:
    one = Collection("po", FOUR, shared=True).draw("w", outputs=5, inputs=8)
    assert bool((one.grid() == one.grid()[0]).all())
    assert not bool((Collection("po", FOUR).draw("w", 5, 8).grid() == one.grid()[0]).all())


# -- in models and steps ----------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.mix = nn.Conv2d(6, 6, 1, bias=False)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.mix(torch.relu(self.bn2(self.conv2(x))))
        return self.fc(x.mean((2, 3)))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, 1, 6, 6, generator=generator)
        y = torch.randint(3, (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("scheme", ["po", "pi", "pio", "single", "individual"])
def test_training_keeps_every_kernel_on_its_own_manifold(scheme: str, backend: str) -> None:
    model = net()
    groups = partition(model, scheme, ["sphere", "oblique", "stiefel", None], seed=3)
    optimizer = FGSGD(groups, lr=0.5, momentum=0.9, backend=backend)
    train(model, optimizer, 5)
    optimizer.check()
    # Not by the optimizer's own plan, but kernel by kernel from the assignment: the scale of 8 inputs is the fan's.
    of, one = assignments(groups)["conv2.weight"]
    where = one.grid().flatten()
    kernels = model.conv2.weight.detach().double().reshape(-1, 3, 3)
    gram = kernels.mT @ kernels
    eye = torch.eye(3, dtype=torch.float64)
    # A float32 QR or normalisation errs by a few eps = 1.2e-7 relative to the squared scale, which is at most 1/4.
    tolerance = 20 * torch.finfo(torch.float32).eps
    assert [type(manifold).__name__ for manifold in of.manifolds] == ["Sphere", "Oblique", "Stiefel", "Euclidean"]
    assert kernels[where == 0].square().sum((1, 2)).sub(2 / 8).abs().max() < tolerance
    assert gram[where == 1].diagonal(dim1=1, dim2=2).sub(2 / 24).abs().max() < tolerance
    assert gram[where == 2].sub(eye * 2 / 24).abs().max() < tolerance
    free = gram[where == 3].diagonal(dim1=1, dim2=2)
    assert free.std() > 0.2 * free.mean()  # Euclidean ones keep the spread of their initialisation


def test_groups_of_a_tensor_step_as_tensors_of_their_own() -> None:
    """[FG] Theorem 1 and Eq. 7 a group at a time: each, cut out into a parameter of its own, takes the same step."""
    layer = nn.Conv2d(6, 8, 3, bias=False)
    groups = partition(layer, "pio", ["sphere", "oblique", "stiefel", None], seed=2)
    gradient = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(1)) * 3
    of, one = assignments(groups)["weight"]
    kernels = layer.weight.detach().reshape(-1, 1, 3, 3)
    alone: list[tuple[Tensor, nn.Parameter]] = []
    for group, members in enumerate(one.members()):
        manifold = of.manifolds[int(one.manifolds[group])]
        cut = nn.Parameter(kernels[members].clone())
        cut.grad = gradient.reshape(-1, 1, 3, 3)[members].clone()
        alone.append((members, cut))
        if isinstance(manifold, Euclidean):
            # No manifold, the same rule: W - lr/tau G with tau = max(1, R (2 + R)).
            r = float(cut.grad.double().norm())
            cut.data -= 0.5 / max(1.0, r * (2 + r)) * cut.grad
            continue
        scale = {Sphere: 2 / 6, Oblique: 2 / 18, Stiefel: 2 / 18}[type(manifold)] ** 0.5
        FGSGD([cut], lr=0.5, manifold=type(manifold)(scale), view="kernel").step()
    layer.weight.grad = gradient
    FGSGD(groups, lr=0.5).step()
    for members, cut in alone:
        got = layer.weight.detach().reshape(-1, 1, 3, 3)[members]
        # The same sums in another order, and the tile's copy: a few roundings of numbers below 1.
        assert torch.allclose(got, cut, atol=8 * torch.finfo(torch.float32).eps, rtol=0)


@pytest.mark.parametrize("scheme", ["pio", "individual"])
def test_one_call_steps_the_whole_collection(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = FGSGD(partition(model, scheme, ["sphere", "stiefel"]), lr=0.1)
    train(model, optimizer, 1)
    calls = []
    operator = optimizer._operator
    monkeypatch.setattr(optimizer, "_operator", lambda *args, **kwargs: calls.append(1) or operator(*args, **kwargs))
    train(model, optimizer, 1)
    assert len(calls) == 1


def test_layers_without_kernels_are_dealt_by_filters_with_a_note() -> None:
    model = net()
    groups = partition(model, "pio", ["sphere", None], linear="same")
    found = assignments(groups)
    assert {name: of.scheme for name, (of, _) in found.items()} == {
        "conv1.weight": "pio",
        "conv2.weight": "pio",
        "mix.weight": "pi",
        "fc.weight": "pi",
    }
    assert found["mix.weight"][1].groups.shape == (6, 1)
    notes = {name: note for group in groups for name, note in group["notes"].items()}
    assert "'pi' deals them" in notes["mix.weight"]


def test_weight_decay_reaches_the_euclidean_kernels_only() -> None:
    layer = nn.Conv2d(6, 8, 3, bias=False)
    groups = partition(layer, "pi", ["sphere", None])
    before = layer.weight.detach().reshape(-1, 9).clone()
    where = assignments(groups)["weight"][1].grid().flatten()
    optimizer = FGSGD(groups, lr=0.5, weight_decay=0.1, step_size="none")
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    after = layer.weight.detach().reshape(-1, 9)
    assert torch.allclose(after[where == 1], before[where == 1] * 0.95)
    assert torch.allclose(after[where == 0], before[where == 0], atol=1e-7)
    with pytest.raises(ValueError, match="weight_decay"):
        FGSGD([{**partition(layer, "pi", ["sphere", "stiefel"])[0], "weight_decay": 0.1}], lr=0.5)


@pytest.mark.parametrize("retraction", ["exp", {"stiefel": "polar", "sphere": "exp"}])
def test_retractions_are_chosen_for_all_or_by_manifold(retraction: object) -> None:
    model = net()
    optimizer = FGSGD(partition(model, "po", ["sphere", "stiefel", None], retraction=retraction), lr=0.5)
    train(model, optimizer, 3)
    assert optimizer.violation() < 1e-5


# -- scales -----------------------------------------------------------------------------------------------------------


def test_rescaling_moves_each_component_and_keeps_the_momentum() -> None:
    model = net()
    optimizer = FGSGD(partition(model, "pio", ["sphere", "stiefel", None]), lr=0.5, momentum=0.9)
    train(model, optimizer, 2)
    weight = model.conv2.weight
    before, momentum = weight.detach().clone(), optimizer.state[weight]["momentum_buffer"].clone()
    where = assignments(optimizer.param_groups)["conv2.weight"][1].grid().flatten()
    old = torch.tensor([(2 / 8) ** 0.5, (2 / 24) ** 0.5, 1.0], dtype=torch.float64)[where]
    for new in (torch.linspace(0.1, 2.0, 48, dtype=torch.float64), torch.linspace(3.0, 0.2, 48, dtype=torch.float64)):
        optimizer.rescale(weight, new)
        ratio = torch.where(where < 2, new / old, 1.0).reshape(6, 8, 1, 1)
        # Two roundings of the product (one for each of the loop's turns).
        assert torch.allclose(weight.detach().double(), before.double() * ratio, rtol=2e-7, atol=0)
        optimizer.check()
    assert optimizer.state[weight]["momentum_buffer"].equal(momentum)
    train(model, optimizer, 2)
    optimizer.check()
    norms = weight.detach().double().reshape(-1, 9).norm(dim=1)
    assert torch.allclose(norms[where == 0], torch.linspace(3.0, 0.2, 48, dtype=torch.float64)[where == 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "scales", "message"),
    [
        ("conv2", -1.0, "> 0"),
        ("conv2", torch.ones(5), "48, one a component"),
        ("conv2", float("nan"), "finite"),
        ("fc", 1.0, "got one without"),
    ],
)
def test_scales_that_do_not_fit_are_refused(name: str, scales: Tensor | float, message: str) -> None:
    model = net()
    optimizer = FGSGD(partition(model, "pio", ["sphere", None]), lr=0.5)
    weight = getattr(model, name).weight
    before = weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        optimizer.rescale(weight, scales)
    assert weight.equal(before)
    with pytest.raises(ValueError, match="another of shape"):
        optimizer.rescale(torch.ones(2), 1.0)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint(optimizer: ManifoldOptimizer) -> dict:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_resumed_collection_goes_on_with_the_same_bits_whatever_its_seed() -> None:
    manifolds = ["sphere", "oblique", "stiefel", None]
    model = net()
    optimizer = FGSGD(partition(model, "pio", manifolds, seed=1), lr=0.5, momentum=0.9)
    train(model, optimizer, 3)
    optimizer.rescale(model.conv2.weight, 0.3)
    saved, weights = checkpoint(optimizer), {name: value.clone() for name, value in model.state_dict().items()}
    train(model, optimizer, 3, seed=1)

    other = net(seed=5)
    resumed = FGSGD(partition(other, "pio", manifolds, seed=2), lr=0.1, momentum=0.1)  # another draw
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    wanted, got = assignments(optimizer.param_groups), assignments(resumed.param_groups)
    assert wanted == got
    train(other, resumed, 3, seed=1)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda group: group["assignments"].pop(), "one Assignment for each"),
        (lambda group: group["assignments"][0].update(groups=torch.zeros(2, 2, dtype=torch.int64)), "wanted"),
        (lambda group: group["assignments"][0]["manifolds"].add_(9), "wanted manifolds 0 to"),
        (lambda group: group["assignments"][0].pop("groups"), "assignments"),
        (lambda group: group["assignments"][1]["groups"].copy_(group["assignments"][1]["groups"].flip(1)), "plan"),
        (lambda group: group["manifold"].update(scheme="none"), "scheme"),
        (lambda group: group["manifold"].pop("manifolds"), "does not describe one"),
    ],
)
def test_an_assignment_that_does_not_fit_is_refused(spoil: object, message: str) -> None:
    model = net()
    optimizer = FGSGD(partition(model, "po", ["sphere", "stiefel"]), lr=0.5)
    saved = checkpoint(optimizer)
    spoil(saved["param_groups"][0])
    before = optimizer.param_groups, optimizer.plan
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert (optimizer.param_groups, optimizer.plan) == before


# -- messages, tables and pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: partition(nn.ReLU(), "pi", ["sphere"]), "wanted a trainable weight"),
        (lambda: partition(nn.Conv2d(4, 6, 1), "po", ["sphere"]), "no inputs for 'po' to split; 'pi' deals them"),
        (lambda: partition(nn.Conv2d(4, 6, 1), "pio", ["sphere"]), "no inputs for 'pio' to split"),
        (lambda: partition(nn.Conv2d(1, 2, 3), "pi", ["sphere"] * 3), "2 components for 3 manifolds"),
        (lambda: partition(nn.Conv2d(4, 1, 3), "pio", ["sphere"]), "single output"),
        (lambda: partition(net(), "pio", ["sphere"], rules={"mix": Collection("po", FOUR)}), "mix.weight cannot lie"),
        (lambda: partition(nn.Conv2d(4, 6, 3), "p", ["sphere"]), "scheme: wanted"),
        (lambda: partition(nn.Conv2d(4, 6, 3), "pi", []), "manifolds: wanted one or more"),
        (lambda: partition(nn.Conv2d(4, 6, 3), "pi", ["round"]), "manifolds: wanted a Manifold"),
        (lambda: partition(nn.Conv2d(4, 6, 3), "pi", ["grassmann"]), "which FGSGD steps"),
        (lambda: partition(nn.Conv2d(4, 6, 3), "pi", ["sphere"], seed=-1), "seed: wanted"),
        (lambda: partition(nn.Conv2d(4, 6, 3), "pi", ["sphere"], subsets=0), "subsets: wanted"),
        (lambda: partition(nn.Conv2d(4, 6, 3), "individual", ["sphere"], subsets=2), "one component a group"),
        (lambda: partition(nn.Conv2d(4, 6, 3), "pio", ["sphere"], shared=True), "shared: is for"),
        (lambda: partition(nn.Conv2d(4, 6, 3), "pi", ["sphere"], retraction="qr"), "retraction: wanted"),
        (lambda: partition(nn.Conv2d(4, 6, 3), "pi", ["sphere"], retraction={"stiefel": "qr"}), "retraction: wanted"),
        (lambda: FGSGD(partition(net(), "pi", ["sphere"], grouping="individual"), lr=1.0), "grouping: has no effect"),
        (lambda: PSISGD(partition(net(), "pi", ["sphere"]), lr=1.0), "PSISGD wants one of"),
        (
            lambda: FGSGD(
                [{"params": [nn.Parameter(torch.ones(2, 2, 3, 3))], "manifold": Collection("pi", FOUR)}], 1.0
            ),
            "assignments: wanted one Assignment",
        ),
        (lambda: FGSGD([nn.Parameter(torch.eye(3))], 1.0, manifold="collection"), "manifold: wanted"),
        (lambda: Assignment(torch.zeros(2, 2), torch.zeros(1, dtype=torch.int64)), "int64 tensor of 2"),
        (lambda: Assignment(torch.zeros(2, 2).long(), torch.zeros(2).long()), "components in each of 2 groups"),
    ],
)
def test_what_cannot_be_dealt_is_refused(make: object, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_the_model_is_as_it_was_after_a_refusal() -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="retraction"):
        partition(model, "pio", ["sphere"], retraction="qr")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_tables_tell_what_lies_where() -> None:
    groups = partition(net(), "po", ["sphere", None])
    console = Console(record=True, width=220, file=io.StringIO())
    print_routing_table(groups, console)
    console.print(partition_table(groups))
    text = console.export_text()
    assert "po(sphere+euclidean)" in text and "12 groups" in text
    lines = [line.split() for line in text.splitlines() if "Sphere(scale='fan')" in line or "Euclidean()" in line]
    # conv2: 6 outputs of 8 inputs, split in two: 24 kernels on each manifold in 6 groups of 4.
    assert ["24", "│", "6", "│", "4", "to", "4"] in [line[-8:-1] for line in lines]
    with pytest.raises(ValueError, match="without 'names'"):
        partition_table([{"manifold": Collection("po", FOUR)}])


def test_the_picture_shows_one_colour_a_manifold_and_one_shade_a_group(tmp_path: Path) -> None:
    from matplotlib.image import imread

    of, one = assignments(partition(nn.Conv2d(40, 30, 3, bias=False), "pio", ["sphere", "stiefel"]))["weight"]
    image = imread(draw_partition(of, one, tmp_path / "grid.png"))[..., :3]
    colours = {tuple((pixel * 255).round().astype(int)) for row in image for pixel in row}
    # 10 groups of two hues at least: the blue of the first manifold, the orange of the second, each in many shades.
    blue = {colour for colour in colours if colour[2] > colour[0] + 20}
    orange = {colour for colour in colours if colour[0] > colour[2] + 20}
    assert len(blue) > 10 and len(orange) > 10


def test_single_manifold_rows_need_no_lists() -> None:
    """POMs of one manifold and individual manifolds are the plans that ``grouping`` makes: stepped without copies."""
    for scheme, grouping in (("single", "layer"), ("individual", "individual")):
        dealt = FGSGD(partition(net(), scheme, ["stiefel"]), lr=0.1)
        plain = FGSGD(param_groups(net(), "stiefel", grouping=grouping), lr=0.1)
        assert dealt.plan.groups.equal(plain.plan.groups)
        assert dealt.plan.components.numel() == 0
