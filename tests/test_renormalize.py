"""Renormalisation: sizes counted by gradients, deviations by numpy and batch norm, and training with the same bits."""

from __future__ import annotations

import copy
import gc
import io
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from manifold_kernels import FGSGD, PSISGD, partition
from manifold_kernels.renormalize import Renormalizer
from manifold_kernels.routing import param_groups

# Weights in float32 are rounded once for every renormalisation, norms of 9 elements to a few units of 6e-8.
ROUNDED = 1e-6


def optimizer_of(model: nn.Module, manifold: Any = "sphere", **options: Any) -> FGSGD:
    return FGSGD(param_groups(model, manifold, **options), lr=0.1, momentum=0.9, backend="reference")


def traced(layer: nn.Module, x: Tensor, view: str = "kernel", **settings: Any) -> Renormalizer:
    """A renormaliser of one layer that has seen ``x`` in training mode."""
    optimizer = optimizer_of(layer, linear="sphere", view=view)
    renormalizer = Renormalizer(layer, optimizer, **settings)
    layer(x)
    return renormalizer


# -- gamma -------------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (3, 8, 6)),
    "strided": (lambda: nn.Conv2d(3, 4, (3, 2), stride=2), (3, 9, 6)),
    "dilated": (lambda: nn.Conv2d(3, 4, 3, dilation=2), (3, 9, 9)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (6, 8, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3), (3, 8, 6)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), (6, 8, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 5), (3, 11)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3), (2, 7, 5, 5)),
    "linear": (lambda: nn.Linear(7, 5), (7,)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("view", ["filter", "matrix"])
def test_gamma_counts_the_inputs_and_outputs_of_a_layer(kind: str, view: str) -> None:
    make, shape = LAYERS[kind]
    layer = make()
    x = torch.randn(1, *shape, requires_grad=True)
    y = layer(x)
    # b: how many inputs move an output in the middle of the map; b': how many outputs there are.
    middle = tuple(size // 2 for size in y.shape[2:])
    (gradient,) = torch.autograd.grad(y[(0, 0, *middle)], x)
    want = (int(gradient.count_nonzero()) + y.numel()) ** -0.5
    [scales] = traced(layer, x, view).scales().values()
    assert scales.tolist() == pytest.approx([want] * len(scales), rel=1e-12)
    assert len(scales) == (y.shape[1] if view == "filter" else 1)


def test_positions_of_a_sequence_do_not_count_for_linear_layers() -> None:
    layer = nn.Linear(3, 4)
    [one] = traced(layer, torch.randn(2, 3)).scales().values()
    [many] = traced(layer, torch.randn(2, 50, 3)).scales().values()
    assert torch.equal(one, many)


class Twice(nn.Module):
    """A layer called with maps of two sizes, and another one with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3)
        self.tied = nn.Conv2d(2, 2, 3)
        self.tied.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.conv(self.conv(x)))


@pytest.mark.parametrize("through_tied_only", [False, True])
def test_a_layer_called_at_several_sizes_counts_with_the_largest(through_tied_only: bool) -> None:
    model = Twice()
    renormalizer = Renormalizer(model, optimizer_of(model))
    if through_tied_only:
        model.tied(torch.randn(1, 2, 8, 8))
    else:
        model(torch.randn(1, 2, 8, 8))  # maps of 6, 4 and 2
    renormalizer.trace(torch.randn(1, 2, 7, 7))
    [(name, scales)] = renormalizer.scales().items()
    assert name == "conv.weight"
    assert scales[0].item() == pytest.approx((18 + 2 * 36) ** -0.5, rel=1e-12)


# -- lambda ------------------------------------------------------------------------------------------------------------


def spread(shape: tuple[int, ...], batch: int = 64) -> Tensor:
    """Features whose channels have deviations of about 0.5, 1.5, 2.5, ..."""
    deviations = torch.arange(shape[0]) + 0.5
    return torch.randn(batch, *shape) * deviations.reshape(-1, *(1,) * (len(shape) - 1)) + 3


def read_by(layer: nn.Module, x: Tensor, component: tuple[int, int]) -> int:
    """The input channel that the kernel ``weight[component]`` reads, found by a gradient with all others at zero."""
    probe = copy.deepcopy(layer)
    with torch.no_grad():
        kept = probe.weight[component].clone()
        probe.weight.zero_()
        probe.weight[component] = kept
    x = x[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(probe(x).sum(), x)
    [channel] = gradient.flatten(2).any(2)[0].nonzero().flatten().tolist()
    return int(channel)


@pytest.mark.parametrize("kind", ["conv2d", "grouped", "transposed", "transposed, grouped"])
def test_a_kernel_has_the_deviation_of_the_channel_that_it_reads(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer = make()
    x = spread(shape)
    renormalizer = traced(layer, x, momentum=1.0)
    renormalizer.step()
    gamma = layer.weight[0, 0].norm().item()
    deviation = np.maximum(x.double().numpy().std((0, 2, 3), ddof=1), 1)
    renormalizer.step()
    for component in np.ndindex(*layer.weight.shape[:2]):
        norm = layer.weight[component].norm().item()
        assert norm * deviation[read_by(layer, x, component)] == pytest.approx(gamma, rel=10 * ROUNDED)


def test_filters_and_matrices_have_the_root_mean_square_of_their_channels() -> None:
    for view in ("filter", "matrix"):
        layer = nn.Conv2d(4, 6, 3, groups=2)
        x = torch.zeros(2, 4, 4, 4)
        x[0] = torch.tensor([2.0, 4.0, 0.2, 6.0]).reshape(4, 1, 1)  # deviations: x[0]/sqrt(2) up to n/(n-1)
        renormalizer = traced(layer, x, view, momentum=1.0)
        [first] = renormalizer.scales().values()
        renormalizer.step()
        [second] = renormalizer.scales().values()
        lambdas = x.std((0, 2, 3)).clamp(min=1)
        first_half = math.sqrt((float(lambdas[0]) ** 2 + float(lambdas[1]) ** 2) / 2)
        second_half = math.sqrt((1 + float(lambdas[3]) ** 2) / 2)
        want = [first_half] * 3 + [second_half] * 3
        if view == "matrix":
            want = [math.sqrt((first_half**2 + second_half**2) / 2)]
        assert (first / second).tolist() == pytest.approx(want, rel=ROUNDED)


@pytest.mark.parametrize("kind", ["conv2d", "conv1d", "conv3d", "grouped", "transposed"])
@pytest.mark.parametrize("momentum", [0.1, 0.5])
def test_deviations_are_those_of_a_batch_norm(kind: str, momentum: float) -> None:
    make, shape = LAYERS[kind]
    layer = make()
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[len(shape) - 1](shape[0], momentum=momentum)
    renormalizer = Renormalizer(layer, optimizer_of(layer), momentum=momentum)
    for batch in (4, 9, 2):
        norm(x := spread(shape, batch))
        layer(x)
    layer(input=(x := spread(shape, 1)))
    norm(x)
    layer.eval()
    layer(spread(shape) * 100)
    [deviations] = renormalizer.deviations().values()
    # Both average in float32; sums may be taken in another order: sqrt(1e4) elements of 6e-8, relative to x^2 <= 2 v.
    assert torch.allclose(deviations, norm.running_var.sqrt(), rtol=1e-5)


def test_deviations_of_sequences_are_over_batch_and_positions() -> None:
    layer = nn.Linear(5, 2)
    x = spread((5,), 60)
    [flat] = traced(layer, x, momentum=1.0).deviations().values()
    [deep] = traced(layer, x.reshape(3, 20, 5).transpose(0, 1), momentum=1.0).deviations().values()
    assert torch.allclose(flat, deep, rtol=1e-5)
    assert np.allclose(flat, x.double().numpy().std(0, ddof=1), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_deviations_in_every_type_and_layout(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    layer = nn.Conv2d(3, 4, 3).to(dtype)
    x = spread((3, 6, 6)).to(dtype).to(memory_format=memory_format)
    [deviations] = traced(layer, x, momentum=1.0).deviations().values()
    assert np.allclose(deviations, x.double().numpy().std((0, 2, 3), ddof=1), rtol=1e-5)
    assert deviations.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_calls_without_a_deviation_are_passed_over() -> None:
    layer = nn.Linear(3, 2)
    for x in (torch.randn(3), torch.randn(1, 3), torch.randn(0, 3)):
        [deviations] = traced(layer, x).deviations().values()
        assert torch.equal(deviations, torch.ones(3))
    conv = nn.Conv2d(2, 2, 3)
    x = torch.randn(2, 5, 5)  # no batch: 25 positions have one
    [alone] = traced(conv, x, momentum=1.0).deviations().values()
    assert np.allclose(alone, x.double().numpy().std((1, 2), ddof=1), rtol=1e-5)


def test_statistics_can_be_switched_off() -> None:
    layer = nn.Conv2d(3, 4, 3)
    renormalizer = traced(layer, spread((3, 8, 8)), statistics=False)
    [first] = renormalizer.scales().values()
    renormalizer.step()
    [second] = renormalizer.scales().values()
    assert torch.equal(first, second)


# -- weights -----------------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.Dropout(0.2), nn.Flatten()
    ).append(nn.Linear(32, 3))


def train(model: nn.Module, optimizer: FGSGD, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        x = 4 * torch.randn(8, 3, 6, 6)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def collection(model: nn.Module) -> FGSGD:
    groups = partition(model, "pio", ["sphere", "oblique", "stiefel", None], seed=0, euclidean={"lr": 0.01})
    return FGSGD(groups, lr=0.1, momentum=0.9, backend="reference")


def test_weights_move_to_the_scales_and_momentum_stays() -> None:
    model = network()
    optimizer = collection(model)
    renormalizer = Renormalizer(model, optimizer)
    train(model, optimizer, range(3))
    for _ in range(2):
        weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        buffers = {p: state["momentum_buffer"].clone() for p, state in optimizer.state.items()}
        scales = renormalizer.scales()
        renormalizer.step()
        optimizer.check()
        assert optimizer.violation() < ROUNDED
        for name, weight in model.named_parameters():
            assert torch.equal(buffers[weight], optimizer.state[weight]["momentum_buffer"])
            if name not in scales:
                assert torch.equal(weight, weights[name])
        # 0.weight: kernels on the sphere have that norm, Euclidean ones stay, directions too.
        for row in range(len(optimizer.plan.groups)):
            if int(optimizer.plan.column("parameter")[row]) != 0:
                continue
            kernels = model[0].weight.detach().flatten(0, 1)[optimizer.plan.members(row)]
            before = weights["0.weight"].flatten(0, 1)[optimizer.plan.members(row)]
            code = int(optimizer.plan.column("manifold")[row])
            assert torch.allclose(nn.functional.cosine_similarity(kernels.flatten(1), before.flatten(1)), torch.ones(1))
            if code == 0:
                assert torch.equal(kernels, before)
            else:
                want = scales["0.weight"][optimizer.plan.members(row)] * (1 if code == 1 else math.sqrt(3))
                assert np.allclose(kernels.flatten(1).norm(dim=1), want, rtol=ROUNDED)
    assert not torch.equal(scales["0.weight"], torch.full_like(scales["0.weight"], float(scales["0.weight"][0])))


def test_the_first_renormalisation_has_lambda_1() -> None:
    model = nn.Conv2d(3, 4, 3)
    optimizer = optimizer_of(model)
    renormalizer = Renormalizer(model, optimizer)
    for _ in range(5):
        model(10 * torch.randn(4, 3, 8, 8))
    [first] = renormalizer.scales().values()
    assert torch.equal(first, torch.full((12,), (27 + 36 * 4) ** -0.5, dtype=torch.float64))
    renormalizer.step()
    [second] = renormalizer.scales().values()
    assert bool((second < first / 2).all())


# -- hooks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", [False, True])
def test_hooks_leave_training_as_it_is_to_the_bit(statistics: bool) -> None:
    runs = []
    for hooked in (False, True):
        model = network()
        optimizer = collection(model)
        if hooked:
            renormalizer = Renormalizer(model, optimizer, statistics=statistics)
            renormalizer.trace(torch.randn(1, 3, 6, 6))
        train(model, optimizer, range(4))
        runs.append((torch.rand(3), *model.state_dict().values()))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_trace_leaves_modes_buffers_statistics_and_random_numbers_as_they_are() -> None:
    class Noisy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            assert not any(module.training for module in self.modules())
            assert not torch.is_grad_enabled()
            return super().forward(x + torch.rand_like(x))

    model = Noisy(*network())
    model[1].eval()
    optimizer = collection(model)
    renormalizer = Renormalizer(model, optimizer)
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    x = torch.randn(2, 3, 6, 6)
    torch.set_rng_state(random)
    renormalizer.trace(x)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(bool((each == 1).all()) for each in renormalizer.deviations().values())
    with pytest.raises(RuntimeError):
        renormalizer.trace(torch.randn(2, 4, 6, 6))
    assert [module.training for module in model.modules()] == modes


def test_hooks_keep_no_graph_alive() -> None:
    layer = nn.Conv2d(3, 4, 3)
    renormalizer = Renormalizer(layer, optimizer_of(layer))
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    y = (2 * x).requires_grad_()
    alive = weakref.ref(y), weakref.ref(layer(y))
    del x, y
    gc.collect()
    assert [each() for each in alive] == [None, None]
    assert not next(iter(renormalizer.deviations().values())).requires_grad


def test_a_copy_of_the_model_tells_nothing_to_the_original() -> None:
    model = network()
    optimizer = collection(model)
    renormalizer = Renormalizer(model, optimizer)
    twin = copy.deepcopy(model)
    twin(100 * torch.randn(2, 3, 6, 6))
    assert all(bool((each == 1).all()) for each in renormalizer.deviations().values())
    with pytest.raises(RuntimeError, match="forward pass"):
        renormalizer.step()
    buffer = io.BytesIO()
    torch.save(model, buffer)  # the model alone: neither optimizer nor renormaliser
    assert buffer.tell() < 3 * sum(value.numel() * 4 for value in model.state_dict().values()) + 20_000


def test_every_renormalises_by_itself_until_it_is_closed() -> None:
    model = network()
    optimizer = collection(model)
    moved = []
    with Renormalizer(model, optimizer, every=3) as renormalizer:
        renormalizer.trace(torch.randn(1, 3, 6, 6))
        for step in range(9):
            before = optimizer.plan.scales.clone()
            train(model, optimizer, range(step, step + 1))
            moved.append(not torch.equal(before, optimizer.plan.scales))
            if step == 3:
                renormalizer.step()  # counts from here
    assert moved == [False, False, True, False, False, False, True, False, False]
    scales = optimizer.plan.scales
    seen = renormalizer.state_dict()["weights"]["0.weight"]["variance"]
    train(model, optimizer, range(9, 14))
    assert optimizer.plan.scales is scales
    assert torch.equal(seen, renormalizer.state_dict()["weights"]["0.weight"]["variance"])
    renormalizer.step()  # by hand it still works
    assert not torch.equal(scales, optimizer.plan.scales)


# -- state -------------------------------------------------------------------------------------------------------------


def test_training_resumes_in_the_middle_of_an_epoch_with_the_same_bits() -> None:
    model = network()
    optimizer = collection(model)
    renormalizer = Renormalizer(model, optimizer, every=4)
    train(model, optimizer, range(6))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), renormalizer.state_dict()], file)
    train(model, optimizer, range(6, 13))

    file.seek(0)
    states = torch.load(file, weights_only=True)
    again = network()
    other = collection(again)
    resumed = Renormalizer(again, other, every=4)
    again.load_state_dict(states[0])
    other.load_state_dict(states[1])
    resumed.load_state_dict(states[2])
    train(again, other, range(6, 13))
    for mine, yours in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, yours)
    assert torch.equal(optimizer.plan.scales, other.plan.scales)
    assert torch.equal(*(each.deviations()["3.weight"] for each in (renormalizer, resumed)))


def test_a_state_is_a_snapshot() -> None:
    model = network()
    renormalizer = Renormalizer(model, collection(model))
    state = renormalizer.state_dict()
    saved = copy.deepcopy(state)
    model(5 * torch.randn(4, 3, 6, 6))
    assert torch.equal(state["weights"]["0.weight"]["variance"], saved["weights"]["0.weight"]["variance"])
    renormalizer.load_state_dict(state)
    model(5 * torch.randn(4, 3, 6, 6))
    assert torch.equal(state["weights"]["0.weight"]["variance"], saved["weights"]["0.weight"]["variance"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("since"), "'since' is missing"),
        (lambda state: state.update(version=7), "wanted version 1, got 7"),
        (lambda state: state.update(calls=-1), "calls: wanted a whole number >= 0, got -1"),
        (lambda state: state["weights"].pop("3.weight"), r"differs in \['3.weight'\]"),
        (lambda state: state["weights"]["3.weight"].update(positions=True), "positions of 3.weight: wanted a whole"),
        (
            lambda state: state["weights"]["3.weight"].update(variance=torch.ones(3)),
            r"\(6,\), got torch.float32 \(3,\)",
        ),
        (lambda state: state["weights"]["3.weight"].update(variance=torch.ones(6).double()), "got torch.float64"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_taken_over(
    change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    model = network()
    renormalizer = Renormalizer(model, collection(model))
    before = renormalizer.state_dict()
    model(torch.randn(4, 3, 6, 6))
    state = renormalizer.state_dict()
    renormalizer.load_state_dict(before)
    change(state)
    with pytest.raises(ValueError, match=message):
        renormalizer.load_state_dict(state)
    assert not any(each["positions"] for each in renormalizer.state_dict()["weights"].values())
    assert all(bool((each == 1).all()) for each in renormalizer.deviations().values())


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_layer_that_was_not_called_is_named() -> None:
    model = network()
    optimizer = collection(model)
    renormalizer = Renormalizer(model, optimizer)
    with pytest.raises(RuntimeError, match=r"got none through \['0.weight', '3.weight'\].*trace"):
        renormalizer.step()
    model[0](torch.randn(1, 3, 6, 6))
    scales = optimizer.plan.scales
    with pytest.raises(RuntimeError, match=r"got none through \['3.weight'\]"):
        renormalizer.step()
    assert optimizer.plan.scales is scales


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e25])
def test_features_that_are_not_finite_are_named_and_nothing_is_moved(value: float) -> None:
    model = network()
    optimizer = collection(model)
    renormalizer = Renormalizer(model, optimizer)
    model(torch.randn(2, 3, 6, 6))
    model[3](torch.full((1, 6, 4, 4), value) * torch.randn(4, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"finite features.*into \['3.weight'\]"):
        renormalizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_renormalised_is_refused() -> None:
    model = network()
    optimizer = collection(model)
    with pytest.raises(TypeError, match="optimizer: wanted an FGSGD, whose weights have scales, got PSISGD"):
        Renormalizer(model, PSISGD(model.parameters(), lr=0.1, backend="reference"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing to renormalise"):
        Renormalizer(model, FGSGD(model.parameters(), lr=0.1, backend="reference"))
    with pytest.raises(ValueError, match=r"belong to .* layer of model, got \['0.weight', '3.weight'\]"):
        Renormalizer(network(), optimizer)
    bare = nn.Embedding(4, 4)
    elsewhere = FGSGD(param_groups(bare, None, rules={"weight": "sphere"}), lr=0.1, backend="reference")
    with pytest.raises(ValueError, match=r"got \['weight'\]"):
        Renormalizer(bare, elsewhere)
    for settings, message in (
        ({"momentum": 0.0}, r"momentum: wanted a number in \(0, 1\], got 0.0"),
        ({"momentum": math.nan}, "momentum: wanted a number"),
        ({"every": 0}, "every: wanted a whole number of steps >= 1 or None, got 0"),
        ({"every": True}, "every: wanted a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            Renormalizer(model, optimizer, **settings)  # type: ignore[arg-type]


def test_a_weight_that_the_optimizer_reads_otherwise_than_its_layer_is_refused() -> None:
    layer = nn.ConvTranspose2d(4, 4, 3)
    nn.init.dirac_(layer.weight)
    with torch.no_grad():
        layer.weight[:] = layer.weight[0, 0] / layer.weight[0, 0].norm()
    optimizer = FGSGD([{"params": [layer.weight], "manifold": "sphere"}], lr=0.1, backend="reference")
    with pytest.raises(ValueError, match="ConvTranspose2d wants transposed=True and channel_groups=1, got False"):
        Renormalizer(layer, optimizer)


def test_a_weight_shared_by_layers_of_other_groups_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"is shared with 0\.weight, wanted as many channel groups there, 1, got 2"):
        Renormalizer(model, optimizer_of(model))
