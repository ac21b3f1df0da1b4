"""What does not fit raises, says what to do, and leaves weights, states and settings as they were."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from manifold_kernels import functional
from manifold_kernels.manifolds import Grassmann, Manifold, Oblique, ScaleInvariant, Sphere, Stiefel
from manifold_kernels.optim import FGSGD, PSISGD, SGDG, AdamG
from manifold_kernels.views import Layout

REFERENCE = {"backend": "reference"}


def conv(of: Manifold, view: str = "kernel", dtype: torch.dtype = torch.float32) -> nn.Parameter:
    weight = nn.Parameter(torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=dtype))
    functional.project_weight_(of, weight, Layout(view))
    return weight


def plain(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape or (3,)))


def listed(value: Any) -> Any:
    """``value`` with lists for tensors, so that == compares all of it."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: listed(item) for key, item in value.items()}
    return [listed(item) for item in value] if isinstance(value, (list, tuple)) else value


class Untouched:
    """Asserts at the end of a ``with`` block that nothing of an optimizer has changed."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def __enter__(self) -> None:
        self.before = self.now()

    def __exit__(self, *error: object) -> None:
        assert self.before == self.now()

    def now(self) -> list[object]:
        groups = self.optimizer.param_groups
        return [listed(self.optimizer.state_dict()), [listed(group["params"]) for group in groups]]


def test_untouched_notices_a_change() -> None:
    weight = plain()
    with pytest.raises(AssertionError), Untouched(FGSGD([weight], lr=0.1, **REFERENCE)):
        weight.data[0] = 2.0


NUMBERS = [
    (FGSGD, {"lr": -0.1}, r"lr: wanted a finite number >= 0, got -0.1"),
    (FGSGD, {"lr": math.nan}, "lr: wanted"),
    (FGSGD, {"lr": math.inf}, "lr: wanted"),
    (FGSGD, {"lr": torch.ones(2)}, "lr: wanted a tensor of one element"),
    (FGSGD, {"lr": torch.tensor(-1.0)}, "lr: wanted"),
    (FGSGD, {"lr": 0.1, "momentum": -0.5}, "momentum: wanted"),
    (FGSGD, {"lr": 0.1, "dampening": math.inf}, "dampening: wanted"),
    (FGSGD, {"lr": 0.1, "weight_decay": -1e-4}, "weight_decay: wanted"),
    (FGSGD, {"lr": 0.1, "step_size": "general", "rho": -1.0, "manifold": Sphere(), "view": "kernel"}, "rho: wanted"),
    (FGSGD, {"lr": 0.1, "step_size": "general", "curvature": math.nan, "manifold": Sphere()}, "curvature: wanted"),
    (FGSGD, {"lr": 0.1, "rho": 2.0}, "rho, curvature: are read with step_size='general' only"),
    (FGSGD, {"lr": 0.1, "nesterov": True}, "nesterov: needs momentum > 0"),
    (FGSGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "nesterov": True}, "nesterov: needs momentum > 0"),
    (FGSGD, {"lr": 0.1, "maximize": 1}, "maximize: wanted one of"),
    (FGSGD, {"lr": 0.1, "manifold": "sphere", "step_size": "bound"}, "step_size: wanted one of"),
    (FGSGD, {"lr": 0.1, "manifold": "sphere", "grouping": "kernel"}, "grouping: wanted one of"),
    (FGSGD, {"lr": 0.1, "manifold": "sphere", "view": "flat"}, "view: wanted one of"),
    (
        FGSGD,
        {"lr": 0.1, "manifold": "sphere", "retraction": "qr"},
        r"retraction: wanted one of \['projection', 'exp'\]",
    ),
    (FGSGD, {"lr": 0.1, "manifold": "torus"}, "manifold: wanted a Manifold, None or one of"),
    (FGSGD, {"lr": 0.1, "manifold": ScaleInvariant()}, "manifold: FGSGD wants one of .* got 'scale_invariant'"),
    (FGSGD, {"lr": 0.1, "nonfinite": "ignore"}, "nonfinite: wanted 'skip' or 'raise'"),
    (PSISGD, {"lr": 0.1, "cut_matrices": True}, "cut_matrices: wanted 'raise' or 'gather', got True"),
    (FGSGD, {"lr": 0.1, "backend": "abacus"}, "backend: wanted"),
    (PSISGD, {"lr": 0.1, "guard": 0.0}, "guard: wanted"),
    (PSISGD, {"lr": 0.1, "manifold": Sphere()}, "manifold: PSISGD wants"),
    (SGDG, {"clip": -0.1}, "clip: wanted"),
    (AdamG, {"betas": (0.9, 1.0)}, r"betas\[1\]: wanted a number in \[0, 1\)"),
    (AdamG, {"betas": 0.9}, "betas: wanted two numbers"),
    (AdamG, {"eps": 0.0}, "eps: wanted"),
]


@pytest.mark.parametrize(("kind", "settings", "message"), NUMBERS)
def test_settings(kind: type, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind([conv(Sphere())], **{**REFERENCE, **settings})


def test_a_setting_of_the_wrong_type() -> None:
    with pytest.raises(TypeError, match=r"lr: wanted a finite number >= 0, got '0\.1' of type str"):
        FGSGD([plain()], lr="0.1", **REFERENCE)


@pytest.mark.parametrize("scale", [0, -1.0, math.nan, math.inf, "wide", True])
def test_scales(scale: object) -> None:
    with pytest.raises(ValueError, match="scale: wanted"):
        Sphere(scale)


GROUPS = [
    ({"params": [conv(Sphere())], "manifold": "sphere", "weight_decay": 5e-4}, "weight_decay: has no effect"),
    ({"params": [plain(4, 3)], "view": "matrix"}, "view: has no effect in a group with .*Euclidean"),
    ({"params": [plain(4, 3)], "grouping": "individual"}, "grouping: has no effect"),
    ({"params": [conv(Sphere())], "manifold": "sphere", "rho": 2.0}, "rho: has no effect .*'step_size': 'corollary2'"),
    ({"params": [plain()], "manifold": "sphere"}, r"parameter 0 of shape \(3,\): view: .* two or more dimensions"),
    ({"params": [plain(4, 3)], "manifold": "sphere", "view": "kernel"}, "view: 'kernel' needs exactly two kernel dim"),
    ({"params": [plain(4, 3, 1, 1)], "manifold": "stiefel"}, "view: 'kernel' would freeze|needs exactly two"),
    ({"params": [plain(4, 1)], "manifold": "oblique"}, "view: 'matrix' would freeze the weight on .* oblique"),
    ({"params": [conv(Sphere())], "manifold": "sphere", "rows": 3, "view": "filter"}, "rows: wanted a divisor of 4"),
    ({"params": [conv(Sphere())], "manifold": "sphere", "rows": 2}, "rows: wanted 1"),
    ({"params": [conv(Sphere())], "manifold": "sphere", "rows": 0}, "rows: wanted a whole number >= 1"),
    ({"params": [conv(Sphere())], "manifold": "sphere", "channel_groups": 2}, "channel_groups: wanted 1"),
    (
        {"params": [conv(Sphere())], "manifold": "sphere", "transposed": True, "channel_groups": 3},
        "channel_groups: wanted a divisor of 4 inputs, got 3",
    ),
    ({"params": [plain().double().to(torch.int32)]}, "dtype: wanted one of .* got torch.int32"),
    ({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]}, "dtype: wanted one of .* got torch.complex64"),
    ({"params": [nn.Parameter(torch.eye(2).to_sparse())]}, "layout: wanted a dense"),
    ({"params": [nn.Parameter(torch.empty(2, device="meta"))]}, "device: wanted cpu, .* got meta"),
    ({"params": [nn.Parameter(torch.ones(2, 1).expand(2, 3))]}, "strides: wanted .* Clone it"),
    ({"params": [nn.Parameter(torch.ones(10).as_strided((4, 3), (2, 1)))]}, "strides: wanted .* Clone it"),
    ({"params": [nn.Parameter(torch.ones(20).as_strided((4, 3), (2, 3)))]}, "strides: wanted .* Clone it"),
    ({"params": nn.LazyLinear(3).parameters()}, "params: wanted initialised parameters, got a lazy one at 0"),
    ({"params": [conv(Sphere(2.0))], "manifold": Sphere(1.0)}, "off its manifold. Wanted sphere .* Project"),
    ({"params": [conv(Oblique()).data.fill_(math.nan)], "manifold": Oblique()}, "off its manifold"),
    ({"params": [plain()], "lr": -1.0}, "param group 1: lr: wanted"),
]


@pytest.mark.parametrize(("group", "message"), GROUPS)
def test_a_group_that_does_not_fit_is_not_added(group: dict, message: str) -> None:
    weight = conv(Stiefel())
    optimizer = FGSGD([weight], lr=0.1, momentum=0.9, manifold=None, **REFERENCE)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    given = dict(group)
    with Untouched(optimizer), pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    assert group.keys() == given.keys()  # the caller's dict is not written either
    optimizer.step()


def test_a_parameter_has_one_group() -> None:
    one, two = plain(), plain(2)
    with pytest.raises(
        ValueError, match=r"parameter 1 of the new group, of shape \(3,\), is in the same group already"
    ):
        FGSGD([one, one], lr=0.1, **REFERENCE)
    optimizer = FGSGD([one], lr=0.1, **REFERENCE)
    with Untouched(optimizer), pytest.raises(ValueError, match=r"parameter 1 .* is in param group 0 already"):
        optimizer.add_param_group({"params": [two, one]})
    with Untouched(optimizer), pytest.raises(TypeError, match="ordered"):
        optimizer.add_param_group({"params": {two}})
    with Untouched(optimizer), pytest.raises(TypeError, match="param_group: wanted a dict"):
        optimizer.add_param_group([two])
    with (
        Untouched(optimizer),
        pytest.raises(ValueError, match=r"wanted parameters in 'params', got \['lr'\]"),
    ):
        optimizer.add_param_group({"lr": 0.1})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"manifld": "stiefel"}, "manifld: is no setting of FGSGD and would have no effect: did you mean 'manifold'"),
        ({"nestrov": True}, "did you mean 'nesterov'"),
        ({"betas": (0.9, 0.99)}, r"betas: is no setting of FGSGD and would have no effect: FGSGD has \['assignments'"),
        ({"fused": True}, "fused: is no setting of FGSGD"),
        ({"capturable": True}, "capturable: is no setting of FGSGD"),
    ],
)
def test_settings_that_would_have_no_effect_are_refused(entry: dict, message: str) -> None:
    optimizer = FGSGD([plain()], lr=0.1, **REFERENCE)
    with Untouched(optimizer), pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [plain()], **entry})


def test_entries_of_others_are_left_alone() -> None:
    """Schedulers and trainers keep numbers of their own in param groups; torch writes None for what is not chosen."""
    entries = {"name": "head", "initial_lr": 1.0, "lr_scale": 0.5, "max_momentum": 0.9, "fused": None, "foreach": None}
    optimizer = FGSGD([{"params": [plain()], **entries}], lr=0.1, **REFERENCE)
    assert entries.items() <= optimizer.param_groups[0].items()


@pytest.mark.parametrize("kind", [PSISGD, SGDG, AdamG])
def test_rules_for_vectors_have_one_view(kind: type) -> None:
    of = kind.accepts[0]()
    with pytest.raises(ValueError, match=r"view: \w+ wants one of \['filter'\] or None, got 'kernel'"):
        kind([{"params": [conv(Grassmann(), "filter")], "manifold": of, "view": "kernel"}], lr=0.1, **REFERENCE)


@pytest.mark.parametrize("kind", [SGDG, AdamG])
@pytest.mark.parametrize("settings", [{"weight_decay": 1e-4}, {"nesterov": True}, {"dampening": 0.1}])
def test_settings_of_the_euclidean_step_raise_on_the_grassmann_manifold(kind: type, settings: dict) -> None:
    group = {"params": [conv(Grassmann(), "filter")], "manifold": "grassmann", **settings}
    with pytest.raises(ValueError, match=f"{next(iter(settings))}: has no effect"):
        kind([group], lr=0.1, **REFERENCE)


def test_defaults_meant_for_euclidean_groups_do_not_raise() -> None:
    groups = [{"params": [conv(Stiefel())], "manifold": "stiefel"}, {"params": [plain()]}]
    optimizer = FGSGD(groups, lr=0.1, weight_decay=5e-4, view="kernel", **REFERENCE)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 5e-4]
    assert [group["view"] for group in optimizer.param_groups] == ["kernel", None]


CHANGES = [
    ({"lr": -0.1}, "param group 0: lr: wanted"),
    ({"weight_decay": 1e-4}, "param group 0: weight_decay: has no effect"),
    ({"manifold": Sphere()}, "param group 0: manifold: is fixed"),
    ({"view": "filter"}, "param group 0: view: is fixed"),
    ({"step_size": "none"}, "param group 0: step_size: is fixed"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_setting_changed_to_nonsense_stops_the_step(change: dict, message: str) -> None:
    weight, bias = conv(Stiefel()), plain()
    groups = [{"params": [weight], "manifold": "stiefel"}, {"params": [bias]}]
    optimizer = FGSGD(groups, lr=0.1, momentum=0.9, **REFERENCE)
    for parameter in (weight, bias):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = dict(optimizer.param_groups[0])
    with Untouched(optimizer):
        optimizer.param_groups[0].update(change)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        optimizer.param_groups[0].update(before)
    optimizer.step()


def test_sparse_gradients_are_refused_before_anything_is_written() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    other = plain()
    optimizer = FGSGD([other, table.weight], lr=0.1, momentum=0.9, **REFERENCE)
    (table(torch.tensor([1, 3])).sum() + other.sum()).backward()
    with Untouched(optimizer), pytest.raises(ValueError, match=r"parameter 1 of shape \(5, 2\): wanted a dense"):
        optimizer.step()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_raise_names_the_parameter_and_writes_nothing(value: float) -> None:
    weights = [conv(Stiefel(), dtype=torch.float16), plain(2)]
    groups = [{"params": weights[:1], "manifold": "stiefel"}, {"params": weights[1:]}]
    optimizer = FGSGD(groups, lr=0.1, momentum=0.9, nonfinite="raise", **REFERENCE)
    # 60,000 is finite in float16, its square is not.
    weights[0].grad, weights[1].grad = torch.full_like(weights[0], 60000.0), torch.tensor([0.0, value])
    with (
        Untouched(optimizer),
        pytest.raises(ValueError, match=r"param group 1, parameter 0 of shape \(2,\): wanted fin"),
    ):
        optimizer.step()
    weights[1].grad = torch.zeros(2)
    optimizer.step()


def test_nonfinite_skip_counts_the_components_left_alone() -> None:
    weight, bias = conv(Stiefel()), plain()
    groups = [{"params": [weight], "manifold": "stiefel"}, {"params": [bias]}]
    optimizer = FGSGD(groups, lr=0.1, momentum=0.9, **REFERENCE)
    before = weight.detach().clone()
    for _ in range(2):
        weight.grad, bias.grad = torch.ones_like(weight), torch.full_like(bias, math.nan)
        weight.grad[1, 0, 2, 2] = math.nan
        weight.grad[3, 1, 0, 0] = math.inf
        optimizer.step()
    moved = (weight != before).flatten(2).any(2)
    assert moved.tolist() == [[True, True], [False, True], [True, True], [True, False]]
    assert optimizer.nonfinite_count() == 4  # two kernels in each of two steps; Euclidean parameters are not counted
    assert weight.isfinite().all()


def test_check_and_violation() -> None:
    weight, bias = conv(Stiefel(0.5)), plain()
    groups = [{"params": [bias]}, {"params": [weight], "manifold": Stiefel(0.5)}]
    optimizer = FGSGD(groups, lr=0.1, **REFERENCE)
    optimizer.check()
    assert optimizer.violation() < 1e-6
    with torch.no_grad():
        weight[2, 1] *= 1.01
    # (1.01 Q)^T (1.01 Q) - I = 0.0201 I, relative to the scale
    assert optimizer.violation() == pytest.approx(0.0201, rel=1e-3)
    with pytest.raises(ValueError, match=r"param group 1, parameter 0 of shape \(4, 2, 3, 3\): is off its manifold"):
        optimizer.check()
    functional.project_weight_(Stiefel(0.5), weight, Layout("kernel"))
    optimizer.check()
    weight.data[0, 0, 0, 0] = math.nan
    assert math.isnan(optimizer.violation())
    with pytest.raises(ValueError, match="off its manifold"):
        optimizer.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of", [Sphere(3.0), Oblique("fan"), Stiefel(0.01)])
@pytest.mark.parametrize("shape", [(3, 5, 3, 3), (64, 96)])
def test_the_tolerance_passes_rounding_and_nothing_much_larger(dtype: torch.dtype, of: Manifold, shape: tuple) -> None:
    # The nearest weight in the storage type passes; one longer by more roundings u than tolerated fails. The tolerance
    # is 16 u for storage and 8 sqrt(n p) v for arithmetic, together at most (16 + 8 sqrt(64 * 96)) u = 643 u in float32
    # and float64, where v = u, and 17 u in 16 bits, where v = 2^-24.
    weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    layout = Layout("kernel" if len(shape) == 4 else "matrix")
    functional.project_weight_(of, weight, layout)
    optimizer = FGSGD([weight], lr=0.1, manifold=of, view=layout.view, **REFERENCE)
    optimizer.check()
    u = torch.finfo(dtype).eps / 2
    roundings = 40 if dtype.itemsize == 2 else 1000
    with torch.no_grad():
        weight.mul_(1 + roundings * u)
    with pytest.raises(ValueError, match="off its manifold"):
        optimizer.check()
