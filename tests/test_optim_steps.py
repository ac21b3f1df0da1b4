"""Steps on manifolds through the optimizers: every setting reaches the operator, one call a step."""

import math
from typing import Any

import geoopt
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from manifold_kernels import functional, ops
from manifold_kernels.manifolds import Grassmann, Manifold, Oblique, ScaleInvariant, Sphere, Stiefel
from manifold_kernels.optim import FGSGD, PSISGD, SGDG, AdamG
from manifold_kernels.views import Layout

BACKENDS = [name for name, reason in ops.backends().items() if reason is None]
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def on(of: Manifold, layout: Layout, *shape: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))
    functional.project_weight_(of, weight, layout)
    return weight


def normal(step: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + step), dtype=torch.float64)


@pytest.mark.parametrize(
    ("of", "peer", "retraction"),
    [
        (Sphere(), geoopt.Sphere(), "projection"),
        (Sphere(), geoopt.SphereExact(), "exp"),
        (Stiefel(), geoopt.EuclideanStiefel(), "qr"),
        (Stiefel(), geoopt.EuclideanStiefelExact(), "exp"),
    ],
)
def test_steps_agree_with_geoopt(backend: str, of: Manifold, peer: Any, retraction: str) -> None:
    # geoopt has no step-size bound and its momentum is another, so neither takes part. float64: 1e-12 leaves room for
    # 10 steps of a few roundings (1e-16) each.
    view, shape = ("filter", (6, 8)) if isinstance(of, Sphere) else ("kernel", (3, 2, 5, 4))
    ours = on(of, Layout(view), *shape)
    theirs = geoopt.ManifoldParameter(ours.detach().clone(), manifold=peer)
    settings = {"step_size": "none", "retraction": retraction, "view": view}
    mine = FGSGD([ours], lr=0.1, manifold=of, backend=backend, **settings)
    other = geoopt.optim.RiemannianSGD([theirs], lr=0.1)
    for step in range(10):
        ours.grad, theirs.grad = normal(step, *shape), normal(step, *shape)
        mine.step()
        other.step()
    torch.testing.assert_close(ours.detach(), theirs.detach().as_subclass(torch.Tensor), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "lengths"),
    [
        # Two kernels whose tangent gradients have norms 3 and 4: R = 5 together.
        ({}, (3 / 35, 4 / 35)),  # tau = 5 (2 + 5)
        ({"grouping": "individual"}, (3 / 15, 4 / 24)),  # 3 (2 + 3), 4 (2 + 4)
        ({"step_size": "none"}, (3, 4)),
        ({"step_size": "general"}, (3 / 35, 4 / 35)),  # rho = 1, c = 0 is Corollary 2
        ({"step_size": "general", "rho": 2.0}, (3 / 45, 4 / 45)),  # 5 (4 + 5)
        ({"step_size": "general", "curvature": 20.0}, (3 / 55, 4 / 55)),  # 5 sqrt(1 + 20 (1 + 5)) = 5 * 11
        ({"step_size": "general", "rho": 0.0, "curvature": 3.0}, (3 / 25, 4 / 25)),  # 5 max(5, sqrt(1 + 3 * 5))
    ],
)
def test_step_sizes(backend: str, settings: dict[str, Any], lengths: tuple[float, float]) -> None:
    weight = nn.Parameter(torch.zeros(2, 1, 2, 2, dtype=torch.float64))
    weight.data[:, 0, 0, 0] = 2.0  # kernels on the sphere of radius 2
    weight.grad = torch.full_like(weight, 0.0)
    weight.grad[:, 0, 0, 0] = 100.0  # radial: projected away
    weight.grad[0, 0, 1, 1], weight.grad[1, 0, 0, 1] = 3.0, -4.0
    optimizer = FGSGD([weight], lr=0.5, manifold=Sphere(2.0), backend=backend, **settings)
    optimizer.step()
    steps = weight[0, 0, 1, 1] / weight[0, 0, 0, 0], weight[1, 0, 0, 1] / weight[1, 0, 0, 0]
    # tan of the angle is ||V||/s
    assert steps[0].item() == pytest.approx(-0.5 * lengths[0] / 2, rel=1e-12)
    assert steps[1].item() == pytest.approx(+0.5 * lengths[1] / 2, rel=1e-12)


def test_settings_of_a_group_hold_for_that_group(backend: str) -> None:
    def make() -> list[nn.Parameter]:
        return [on(Stiefel(), Layout("kernel"), 2, 2, 3, 3), on(Stiefel(), Layout("kernel"), 4, 2, 3, 3)]

    together, apart = make(), make()
    first = {"lr": 0.5, "momentum": 0.9, "dampening": 0.1, "step_size": "none"}
    second = {"lr": 0.1, "momentum": 0.5, "nesterov": True, "maximize": True, "retraction": "polar"}
    groups = [{"params": [p], **s} for p, s in zip(together, (first, second), strict=True)]
    optimizers = [FGSGD(groups, lr=9.0, manifold="stiefel", backend=backend)]
    optimizers += [
        FGSGD([p], manifold="stiefel", backend=backend, **s) for p, s in zip(apart, (first, second), strict=True)
    ]
    for step in range(3):
        for a, b in zip(together, apart, strict=True):
            a.grad, b.grad = normal(step, *a.shape), normal(step, *a.shape)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(together, apart, strict=True):
        assert torch.equal(a, b)


def filters(weight: torch.Tensor, transposed_groups: int) -> torch.Tensor:
    """One row a filter: all weights into one output channel, in any order."""
    if not transposed_groups:
        return weight.flatten(1)
    return torch.cat([part.transpose(0, 1).flatten(1) for part in weight.chunk(transposed_groups)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("transposed_groups", [0, 1, 2])
def test_filters_stay_on_their_sphere(
    backend: str, transposed_groups: int, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    weight = nn.Parameter(torch.empty(4, 6, 3, 3, dtype=dtype).contiguous(memory_format=memory_format))
    nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    norms = filters(weight.detach().double(), transposed_groups).norm(dim=1)
    with torch.no_grad():
        for row, norm in zip(filters_view(weight, transposed_groups), norms, strict=True):
            row.mul_(1.5 / norm)
    group = {"params": [weight], "transposed": transposed_groups > 0, "channel_groups": max(transposed_groups, 1)}
    optimizer = FGSGD([group], lr=0.3, momentum=0.9, manifold=Sphere(1.5), view="filter", backend=backend)
    start = weight.detach().clone()
    for step in range(5):
        weight.grad = normal(step, *weight.shape).to(dtype).contiguous(memory_format=memory_format)
        optimizer.step()
    after = filters(weight.detach().double(), transposed_groups).norm(dim=1)
    # Rounding to storage changes a norm by at most eps/2; the arithmetic in float32 adds less than 8 of its roundings.
    bound = torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps / 2
    assert (after / 1.5 - 1).abs().max() <= bound
    assert (weight - start).abs().max() > 0.01
    assert weight.is_contiguous(memory_format=memory_format)
    assert optimizer.state[weight]["momentum_buffer"].stride() == weight.stride()


def filters_view(weight: torch.Tensor, transposed_groups: int) -> list[torch.Tensor]:
    if not transposed_groups:
        return list(weight)
    return [part[:, d] for part in weight.chunk(transposed_groups) for d in range(weight.shape[1])]


def test_theorem_1_of_psi(backend: str) -> None:
    # Training from a w is the same as from w, for a positive a per vector: [PSI] Theorem 1. The loss depends on the
    # direction of each row only.
    def train(alpha: torch.Tensor) -> torch.Tensor:
        weight = nn.Parameter(normal(0, 5, 7) * alpha)
        optimizer = PSISGD([weight], lr=0.5, momentum=0.9, manifold=ScaleInvariant(), guard=math.inf, backend=backend)
        target = normal(1, 5, 7)
        for _ in range(20):
            optimizer.zero_grad()
            (nn.functional.normalize(weight) * target).sum().backward()
            optimizer.step()
        return nn.functional.normalize(weight.detach())

    alpha = torch.tensor([1e-4, 1e-1, 1.0, 3.0, 1e4], dtype=torch.float64).unsqueeze(1)
    # 20 steps, each of which may amplify the error of the last a little: 1e-10 against 1e-16.
    torch.testing.assert_close(train(alpha), train(torch.ones_like(alpha)), rtol=0, atol=1e-10)


def test_psi_guard_and_rows(backend: str) -> None:
    weight = nn.Parameter(torch.tensor([[3.0], [4.0], [0.6], [0.8]], dtype=torch.float64))
    groups = [{"params": [weight], "manifold": "scale_invariant", "rows": 2}]
    optimizer = PSISGD(groups, lr=0.1, momentum=0.9, guard=2.0, backend=backend)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    # Two rows are one vector: (3, 4) has norm 5 > 2 and is divided by it, (0.6, 0.8) has norm 1.
    assert weight.flatten().tolist() == pytest.approx([0.6, 0.8, 0.6, 0.8], rel=1e-15)


@pytest.mark.parametrize("kind", [SGDG, AdamG])
def test_grassmann_weights_and_momenta(backend: str, kind: type) -> None:
    weight = on(Grassmann(), Layout("filter"), 5, 3, 3, 3)
    optimizer = kind([weight], manifold="grassmann", backend=backend)
    start = weight.detach().clone()
    for step in range(20):
        weight.grad = 1e3 * normal(step, *weight.shape)
        optimizer.step()
    rows = weight.detach().flatten(1)
    momentum = optimizer.state[weight]["exp_avg" if kind is AdamG else "momentum_buffer"].flatten(1)
    assert (rows.norm(dim=1) - 1).abs().max() < 1e-14
    assert ((rows * momentum).sum(1).abs() / momentum.norm(dim=1)).max() < 1e-14
    assert (rows * start.flatten(1)).sum(1).max() < 0.999


def test_sgd_g_without_momentum_is_a_clipped_geodesic_step(backend: str) -> None:
    ours = on(Grassmann(), Layout("filter"), 6, 8)
    theirs = geoopt.ManifoldParameter(ours.detach().clone(), manifold=geoopt.SphereExact())
    mine = SGDG([ours], lr=0.2, momentum=0.0, clip=math.inf, manifold="grassmann", backend=backend)
    other = geoopt.optim.RiemannianSGD([theirs], lr=0.2)
    for step in range(5):
        ours.grad, theirs.grad = normal(step, 6, 8), normal(step, 6, 8)
        mine.step()
        other.step()
    torch.testing.assert_close(ours.detach(), theirs.detach().as_subclass(torch.Tensor), rtol=0, atol=1e-13)
    before = ours.detach().clone()
    mine.param_groups[0]["clip"] = 0.1
    ours.grad = 1e6 * normal(9, 6, 8)
    mine.step()
    angle = (before * ours.detach()).sum(1).acos()
    # cos(0.02) is 1 - 2e-4: acos loses four of the sixteen digits.
    torch.testing.assert_close(angle, torch.full_like(angle, 0.2 * 0.1), rtol=1e-9, atol=0)


def mixed() -> list[dict[str, Any]]:
    """Four manifolds, four dtypes, in one optimizer."""
    return [
        {"params": [on(Stiefel("fan"), Layout("kernel"), 4, 2, 3, 3, dtype=torch.float32)], "manifold": Stiefel("fan")},
        {"params": [on(Oblique(), Layout("matrix"), 6, 5, dtype=torch.bfloat16)], "manifold": "oblique", "lr": 0.3},
        {"params": [on(Sphere(), Layout("filter"), 3, 4)], "manifold": "sphere", "view": "filter", "momentum": 0.0},
        {"params": [nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones((), dtype=torch.float16))]},
    ]


def give_gradients(groups: list[dict[str, Any]], step: int) -> None:
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = normal(step, *parameter.shape).to(parameter.dtype)


def test_one_operator_call_a_step_with_lists_made_once(backend: str) -> None:
    groups = mixed()
    optimizer = FGSGD(groups, lr=0.1, momentum=0.9, backend=backend)
    give_gradients(groups, 0)
    optimizer.step()
    step_, calls = optimizer._operator, []
    optimizer._operator = lambda *args: calls.append(args) or step_(*args)
    for step in range(1, 4):
        give_gradients(groups, step)
        optimizer.step()
    assert len(calls) == 3
    for one, other in zip(calls[0], calls[2], strict=True):
        if one is not calls[0][1]:  # the gradients
            assert one is other
    optimizer.param_groups[1]["lr"] = 0.7
    optimizer.step()
    assert calls[3][9][:, 0].tolist() == [0.1, 0.7, 0.1, 0.1]
    assert calls[3][2] is calls[0][2]
    assert [m.numel() > 0 for m in calls[0][2]] == [True, True, False, True, True]
    assert calls[0][4].tolist() == [5] * 5
    optimizer.check()


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_dispatches_nothing_but_the_operator(backend: str) -> None:
    if backend == "reference":
        pytest.skip("the reference is made of PyTorch's operators")
    groups = mixed()
    optimizer = FGSGD(groups, lr=0.1, momentum=0.9, backend=backend)
    give_gradients(groups, 0)
    optimizer.step()
    with Recorder() as recorder:
        optimizer.step()
    # The profiler's range around step() is torch's own.
    assert [name for name in recorder.names if "profiler" not in name] == ["manifold_kernels.step_.default"]


def test_an_added_group_keeps_states_scales_and_counts(backend: str) -> None:
    first = on(Sphere(2.0), Layout("kernel"), 3, 2, 3, 3)
    second = on(Stiefel(), Layout("kernel"), 2, 2, 3, 3)
    optimizer = FGSGD([first], lr=0.1, momentum=0.9, manifold=Sphere(2.0), backend=backend)
    first.grad = normal(0, *first.shape)
    first.grad[0, 0, 0, 0] = math.nan
    optimizer.step()
    buffer = optimizer.state[first]["momentum_buffer"]
    with torch.no_grad():  # as a renormalisation does
        optimizer.plan.scales.mul_(1.5)
        first.mul_(1.5)
    optimizer.add_param_group({"params": second, "manifold": "stiefel"})
    first.grad, second.grad = normal(1, *first.shape), normal(2, *second.shape)
    optimizer.step()
    assert optimizer.nonfinite_count() == 1
    assert optimizer.state[first]["momentum_buffer"] is buffer
    assert [int(optimizer.state[p]["step"]) for p in (first, second)] == [2, 1]
    optimizer.check()
    norms = first.detach().flatten(2).norm(dim=2)
    torch.testing.assert_close(norms, torch.full_like(norms, 3.0), rtol=1e-14, atol=0)
