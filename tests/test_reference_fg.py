"""FG-SGD steps of the reference: against geoopt, the theorems of [FG], and steps of one component at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import geoopt
import pytest
import torch
from stepping import copy, group, place_, run_steps, start
from torch import Tensor

from manifold_kernels import functional as F
from manifold_kernels.manifolds import Euclidean, Manifold, Oblique, Sphere, Stiefel
from manifold_kernels.plan import HYPER_COLUMNS
from manifold_kernels.reference import step_
from manifold_kernels.reference.rules import Hyper
from manifold_kernels.views import Layout

KERNEL = Layout("kernel")
EPS = torch.finfo(torch.float64).eps
CURVED: list[Manifold] = [Sphere(), Oblique(), Stiefel()]
RETRACTIONS = [(of, name) for of in CURVED for name in of.retractions]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def ids(value: object) -> str | None:
    return repr(value) if isinstance(value, Manifold) else None


def wavy(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The gradient of a smooth function without symmetries."""
    a, b = torch.randn_like(weight), torch.randn_like(weight)
    return lambda w: a * w + torch.sin(b * w) + b


def test_hyper_parameters_are_the_columns_of_the_contract() -> None:
    assert Hyper._fields == HYPER_COLUMNS


@pytest.mark.parametrize(
    ("of", "layout", "peer"),
    [(Sphere(), Layout("filter"), geoopt.Sphere()), (Stiefel(), KERNEL, geoopt.EuclideanStiefel())],
    ids=ids,
)
def test_twenty_steps_equal_geoopt(of: Manifold, layout: Layout, peer: geoopt.Manifold) -> None:
    """geoopt retracts by normalisation on the sphere and by QR with positive diagonal on EuclideanStiefel."""
    w = place_(of, torch.randn(6, 4, 5, 3, dtype=torch.float64), layout)
    gradient = wavy(w)
    points = w.flatten(1) if layout.view == "filter" else w
    weight = geoopt.ManifoldParameter(points.clone(), manifold=peer)
    optimizer = geoopt.optim.RiemannianSGD([weight], lr=0.1)
    for _ in range(20):
        weight.grad = gradient(weight.detach().reshape(w.shape)).reshape(weight.shape)
        optimizer.step()
    run = run_steps(step_, [w], lambda now: [gradient(now[0])], [group(of, layout)], [{"lr": 0.1}], count=20)
    # 20 steps, each with a few roundings that the next steps may amplify by 1 + lr |Hessian| < 1.5 at most.
    torch.testing.assert_close(run.params[0], weight.detach().reshape(w.shape), rtol=0, atol=1e-12)


def moved(before: Tensor, after: Tensor) -> Tensor:
    """How far every kernel went along its geodesic on the unit sphere."""
    return F.dist("sphere", before, after)


@pytest.mark.parametrize("size", [0.0, 1e-12, 0.1, 1.0, 1e6, 1e30, 1e200])
@pytest.mark.parametrize("individual", [False, True])
def test_corollary_2_bounds_the_step(size: float, individual: bool) -> None:
    """``||V_g|| <= (sqrt(2) - 1) lr`` whatever the gradient; exp on the sphere walks exactly ``||V||``."""
    lr = 0.7
    w = place_(Sphere(), torch.randn(4, 3, 3, 3, dtype=torch.float64), KERNEL)
    rows = [group(Sphere(), retraction="exp", step_size="general", individual=individual)]
    run = run_steps(step_, [w], [[size * torch.randn_like(w)]], rows, [{"lr": lr}])
    length = moved(w, run.params[0])
    bound = (math.sqrt(2) - 1) * lr * (1 + 10 * EPS) + 4 * EPS
    assert float(length.max() if individual else length.norm()) <= bound
    # Where R is small, tau is 1 and the step plain.
    if size <= 1e-12:
        torch.testing.assert_close(run.params[0], w, rtol=0, atol=10 * lr * size + 4 * EPS)


@pytest.mark.parametrize(
    ("r", "rho", "curvature", "length"),
    [
        (math.sqrt(2) - 1, 1.0, 0.0, math.sqrt(2) - 1),  # where Corollary 2's bound is attained
        (0.25, 1.0, 0.0, 0.25),  # R(2 + R) < 1: no reduction
        (2.0, 1.0, 0.0, 1 / 4),  # tau = 2 * (2 + 2)
        (math.sqrt(1.25) - 0.5, 0.5, 0.0, math.sqrt(1.25) - 0.5),  # the general bound sqrt(rho^2 + 1) - rho
        (2.0, 0.5, 8.0, 2 / math.sqrt(84)),  # max(3^2, 1 + 8 * 2.5) = 21, tau = sqrt(4 * 21)
        (2.0, 2.0, 8.0, 2 / math.sqrt(144)),  # max(6^2, 1 + 8 * 4 = 33) = 36, tau = sqrt(4 * 36)
    ],
)
def test_step_size_by_hand(r: float, rho: float, curvature: float, length: float) -> None:
    """[FG] Eq. 5 for a group of four kernels whose Riemannian gradients have norm R together."""
    w = place_(Sphere(), torch.randn(2, 2, 3, 3, dtype=torch.float64), KERNEL)
    grad = F.proj("sphere", w, torch.randn_like(w))
    grad *= r / grad.norm()
    rows = [group(Sphere(), retraction="exp", step_size="general")]
    run = run_steps(step_, [w], [[grad]], rows, [{"lr": 0.5, "rho": rho, "curvature": curvature}])
    assert float(moved(w, run.params[0]).norm()) == pytest.approx(0.5 * length, rel=1e-13)


@pytest.mark.parametrize("of", CURVED, ids=ids)
def test_individual_components_are_groups_of_one(of: Manifold) -> None:
    w = place_(of, torch.randn(3, 2, 3, 3, dtype=torch.float64), KERNEL)
    grads = [[torch.randn_like(w)] for _ in range(3)]
    hyper = [{"momentum": 0.9}]
    together = run_steps(step_, [w], grads, [group(of, step_size="general", individual=True)], hyper)
    rows = [group(of, step_size="general", components=torch.tensor([k])) for k in range(6)]
    apart = run_steps(step_, [w], grads, rows, hyper)
    shared = run_steps(step_, [w], grads, [group(of, step_size="general")], hyper)
    # The same arithmetic, but for the one norm that is not a sum.
    torch.testing.assert_close(together.params[0], apart.params[0], rtol=0, atol=10 * EPS)
    # With R = 6 and not 2.4 per kernel, a group's step is shorter by about its number of kernels' root.
    assert float((shared.params[0] - w).norm()) < 0.6 * float((together.params[0] - w).norm())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_listed_components_step_as_tensors_of_their_own(momentum: float) -> None:
    """Four manifolds in one tensor, at random places, with a scale for every component."""
    manifolds: list[Manifold] = [Sphere(), Oblique(), Stiefel(), Euclidean()]
    w = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    order = torch.randperm(20)
    scales = torch.rand(20, dtype=torch.float64) + 0.5
    parts = [order[:3], order[3:10], order[10:14], order[14:]]
    for of, part in zip(manifolds, parts, strict=True):
        for k in part.tolist():
            place_(of, w[k // 4, k % 4][None, None], KERNEL, float(scales[k]) if of.name != "euclidean" else None)
    grads = [torch.randn_like(w) for _ in range(3)]
    hyper = [{"momentum": momentum, "nesterov": float(momentum > 0)}]
    rows = [
        group(of, "kernel", step_size="general", components=part, scale=scales[part])
        for of, part in zip(manifolds, parts, strict=True)
    ]
    run = run_steps(step_, [w], [[g] for g in grads], rows, hyper)
    for of, part in zip(manifolds, parts, strict=True):
        own = w.flatten(0, 1)[part][:, None]
        own_grads = [[g.flatten(0, 1)[part][:, None]] for g in grads]
        row = group(of, "kernel", step_size="general", scale=scales[part])
        alone = run_steps(step_, [own], own_grads, [row], hyper)
        torch.testing.assert_close(run.params[0].flatten(0, 1)[part][:, None], alone.params[0], rtol=0, atol=10 * EPS)
        if momentum:
            assert torch.equal(run.momenta[0].flatten(0, 1)[part][:, None], alone.momenta[0])


@pytest.mark.parametrize(("of", "name"), RETRACTIONS, ids=ids)
def test_scales_carry_over(of: Manifold, name: str) -> None:
    """A step at scale s is s times that at scale 1 with gradients s times as large; powers of two, so to the bit."""
    w = place_(of, torch.randn(4, 2, 3, 3, dtype=torch.float64), KERNEL)
    grad = torch.randn_like(w)
    unit = run_steps(step_, [w], [[grad]] * 3, [group(of, retraction=name)], [{}])
    quarter = run_steps(step_, [w / 4], [[grad / 4]] * 3, [group(of, retraction=name, scale=0.25)], [{}])
    assert torch.equal(quarter.params[0] * 4, unit.params[0])


@pytest.mark.parametrize(("of", "name"), RETRACTIONS, ids=ids)
def test_wide_and_tall(of: Manifold, name: str) -> None:
    """A hundred steps stay on the manifold to rounding, whatever the shape."""
    for shape in ((2, 3, 2, 5), (2, 3, 5, 2), (2, 2, 7, 7)):
        w = place_(of, torch.randn(shape, dtype=torch.float32), KERNEL)
        gradient = wavy(w)
        row = group(of, retraction=name)
        run = run_steps(step_, [w], lambda now, g=gradient: [g(now[0])], [row], [{"momentum": 0.9}], count=100)
        # Arithmetic in float64 and one rounding of every element: norms and Gram elements change by eps at most.
        assert F.weight_violation(of, run.params[0], KERNEL) <= 1.01 * torch.finfo(torch.float32).eps
        assert float((run.params[0] - w).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("of", "name"), RETRACTIONS, ids=ids)
def test_short_types_are_the_float64_step_rounded(of: Manifold, name: str, dtype: torch.dtype) -> None:
    w = place_(of, torch.randn(4, 3, 3, 3).to(dtype), KERNEL)
    grad = torch.randn(4, 3, 3, 3).to(dtype)
    short = run_steps(step_, [w], [[grad]], [group(of, retraction=name, step_size="general")], [{"momentum": 0.9}])
    long = run_steps(
        step_, [w.double()], [[grad.double()]], [group(of, retraction=name, step_size="general")], [{"momentum": 0.9}]
    )
    assert torch.equal(short.params[0], long.params[0].to(dtype))


def steps_of_single_matrices(of: Manifold, w: Tensor, grad: Tensor) -> Tensor:
    """One plain step of the matrix ``w`` as a weight of its own."""
    run = run_steps(step_, [w[None, None]], [[grad[None, None]]], [group(of, "kernel")], [{}])
    return run.params[0][0, 0]


def test_grouped_transposed_convolutions() -> None:
    """Weight (inputs, D, a, b) in two channel groups: filter (group, d) gathers the group's inputs."""
    w = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    grad = torch.randn_like(w)
    layout = Layout("filter", out_dim=1, channel_groups=2)
    place_(Sphere(), w, layout)
    run = run_steps(step_, [w], [[grad]], [group(Sphere(), layout)], [{}])
    for part, d in itertools.product((slice(0, 3), slice(3, 6)), range(4)):
        assert float(w[part, d].norm()) == pytest.approx(1, rel=1e-14)
        alone = steps_of_single_matrices(Sphere(), w[part, d].reshape(-1, 1), grad[part, d].reshape(-1, 1))
        torch.testing.assert_close(run.params[0][part, d].reshape(-1, 1), alone, rtol=0, atol=4 * EPS)
    for of in (Stiefel(), Oblique()):
        layout = Layout("matrix", out_dim=1, channel_groups=2)
        place_(of, w, layout)
        run = run_steps(step_, [w], [[grad]], [group(of, layout)], [{}])

        def columns(t: Tensor) -> Tensor:
            return torch.stack([t[part, d].flatten() for part in (slice(0, 3), slice(3, 6)) for d in range(4)], 1)

        alone = steps_of_single_matrices(of, columns(w), columns(grad))
        torch.testing.assert_close(columns(run.params[0]), alone, rtol=0, atol=20 * EPS)


@pytest.mark.parametrize("layout", [KERNEL, Layout("filter"), Layout("matrix"), Layout("filter", rows=2)], ids=str)
def test_memory_formats_do_not_matter(layout: Layout) -> None:
    """channels_last, sliced and expanded tensors hold the same numbers, and what lies between is not touched."""
    of = Stiefel() if layout.view == "kernel" else Sphere()
    w = place_(of, torch.randn(4, 6, 3, 3), layout)
    grad = torch.randn(1, 6, 1, 1).expand(4, 6, 3, 3)
    hyper = [{"momentum": 0.9}]
    rows = [group(of, layout, step_size="general")]
    plain = run_steps(step_, [w], [[grad.contiguous()]] * 2, rows, hyper)
    last = run_steps(step_, [w.to(memory_format=torch.channels_last)], [[grad]] * 2, rows, hyper)
    assert torch.equal(last.params[0], plain.params[0])
    assert last.params[0].is_contiguous(memory_format=torch.channels_last)
    whole = torch.full((8, 6, 3, 4), 7.0)
    inside = whole[::2, :, :, 1:]
    inside.copy_(w)
    run = start([w], rows, hyper)
    run.params[0] = inside
    run_steps(step_, run, [[grad]] * 2, rows, hyper)
    assert torch.equal(inside, plain.params[0])
    assert bool((whole[1::2] == 7).all()) and bool((whole[..., 0] == 7).all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("of", CURVED, ids=ids)
def test_non_finite_gradients_leave_their_component(of: Manifold, value: float) -> None:
    w = place_(of, torch.randn(2, 3, 3, 3), KERNEL)
    good, bad = torch.randn_like(w), torch.randn_like(w)
    bad[1, 2, 0, 1] = value
    hyper = [{"momentum": 0.9}]
    rows = [group(of, step_size="general")]
    run = run_steps(step_, [w], [[good], [bad]], rows, hyper)
    before = run_steps(step_, [w], [[good]], rows, hyper)
    assert run.nonfinite.tolist() == [1] and run.steps.tolist() == [2]
    assert torch.equal(run.params[0][1, 2], before.params[0][1, 2])
    assert torch.equal(run.momenta[0][1, 2], before.momenta[0][1, 2])
    # The others step as if it were not in the group.
    first = start([w.flatten(0, 1)[:5][None]], rows, hyper)
    first.params[0].copy_(before.params[0].flatten(0, 1)[:5])
    first.momenta[0].copy_(before.momenta[0].flatten(0, 1)[:5])
    first.steps += 1
    alone = run_steps(step_, first, [[bad.flatten(0, 1)[:5][None]]], rows, hyper)
    assert torch.equal(alone.params[0][0], run.params[0].flatten(0, 1)[:5])


@pytest.mark.parametrize("of", CURVED, ids=ids)
def test_momentum_that_overflows_leaves_its_component(of: Manifold) -> None:
    """60000 + 0.9 * 60000 is finite in float32 but not in float16, where it would be stored."""
    w = place_(of, torch.randn(1, 2, 3, 3).half(), KERNEL)
    grad = torch.randn_like(w)
    grad[0, 0, 1, 1] = 60000
    rows, hyper = [group(of, step_size="general")], [{"momentum": 0.9}]
    once = run_steps(step_, [w], [[grad]], rows, hyper)
    other = start([once.params[0][:, 1:]], rows, hyper)
    other.momenta[0].copy_(once.momenta[0][:, 1:])
    other.steps += 1
    run = run_steps(step_, [w], [[grad]] * 2, rows, hyper)
    assert run.nonfinite.tolist() == [1]
    assert torch.equal(run.params[0][0, 0], once.params[0][0, 0])
    assert torch.equal(run.momenta[0][0, 0], grad[0, 0])
    # The other steps as if it were alone: what overflowed has no part in the norm of the group.
    run_steps(step_, other, [[grad[:, 1:]]], rows, hyper)
    assert torch.equal(run.params[0][:, 1:], other.params[0])
    assert not torch.equal(run.params[0][0, 1], once.params[0][0, 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_stored_momentum_is_what_is_stepped_along(dtype: torch.dtype) -> None:
    w = place_(Stiefel(), torch.randn(4, 3, 3, 3).to(dtype), KERNEL)
    first, second = torch.randn_like(w), torch.randn_like(w)
    once = run_steps(step_, [w], [[first]], [group(Stiefel())], [{"momentum": 0.9}])
    twice = run_steps(step_, [w], [[first], [second]], [group(Stiefel())], [{"momentum": 0.9}])
    along = run_steps(step_, once.params, [[twice.momenta[0]]], [group(Stiefel())], [{}])
    assert torch.equal(along.params[0], twice.params[0])


def test_a_parameter_of_non_finite_gradients_stays() -> None:
    w = place_(Stiefel(), torch.randn(2, 3, 3, 3), KERNEL)
    run = run_steps(step_, [w], [[torch.full_like(w, math.nan)]], [group(Stiefel(), retraction="polar")], [{}])
    assert torch.equal(run.params[0], w) and run.nonfinite.tolist() == [6]


HUGE = {torch.float64: 1e307, torch.float32: 1e30, torch.bfloat16: 1e30, torch.float16: 1e4}


@pytest.mark.parametrize("dtype", list(HUGE), ids=str)
@pytest.mark.parametrize("step_size", ["none", "general"])
@pytest.mark.parametrize(("of", "name"), RETRACTIONS, ids=ids)
def test_huge_gradients_stay_on_the_manifold(of: Manifold, name: str, step_size: str, dtype: torch.dtype) -> None:
    w = place_(of, torch.randn(3, 4, 3, 3).to(dtype), KERNEL)
    grads = [[(HUGE[dtype] * torch.randn(3, 4, 3, 3, dtype=torch.float64)).to(dtype)] for _ in range(5)]
    hyper = [{"momentum": 0.5, "nesterov": 1, "lr": 2.0}]
    run = run_steps(step_, [w], grads, [group(of, retraction=name, step_size=step_size)], hyper)
    # Rounding of the elements to their type, as after any other step.
    assert F.weight_violation(of, run.params[0], KERNEL) <= 1.01 * torch.finfo(dtype).eps + 20 * EPS
    assert run.nonfinite.tolist() == [0]


@pytest.mark.parametrize("dtype", list(HUGE), ids=str)
@pytest.mark.parametrize("step_size", ["none", "general"])
@pytest.mark.parametrize(("of", "name"), RETRACTIONS, ids=ids)
def test_the_largest_gradients_of_all(of: Manifold, name: str, step_size: str, dtype: torch.dtype) -> None:
    """Nesterov's look-ahead and every sum of them overflow; so does R in float64, where tau then is infinite."""
    w = place_(of, torch.randn(3, 4, 3, 3).to(dtype), KERNEL)
    grad = torch.randn_like(w).sign() * torch.finfo(dtype).max
    hyper = [{"momentum": 0.9, "nesterov": 1}]
    run = run_steps(step_, [w], [[grad]], [group(of, retraction=name, step_size=step_size)], hyper)
    assert F.weight_violation(of, run.params[0], KERNEL) <= 1.01 * torch.finfo(dtype).eps + 20 * EPS
    assert run.nonfinite.tolist() == [0]
    assert step_size == "general" or not torch.equal(run.params[0], w)


@pytest.mark.parametrize("name", ["cayley", "exp"])
def test_long_steps_from_rounded_weights(name: str) -> None:
    """Edelman's formula grows exponentially off the manifold, where weights of 8 bits always are."""
    w = place_(Stiefel(), torch.randn(16, 16, 3, 3).bfloat16(), KERNEL)
    grads = [[torch.randn_like(w) * 1e30] for _ in range(10)]
    run = run_steps(step_, [w], grads, [group(Stiefel(), retraction=name)], [{}])
    assert F.weight_violation(Stiefel(), run.params[0], KERNEL) <= 1.01 * torch.finfo(torch.bfloat16).eps
    assert run.nonfinite.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_gradients_have_the_right_direction(dtype: torch.dtype) -> None:
    """Beside a huge step the weight is nothing: what remains is the normalised projection of the gradient."""
    w = place_(Sphere(), torch.randn(2, 2, 3, 3).to(dtype), KERNEL)
    grad = torch.randn_like(w)
    run = run_steps(step_, [w], [[grad * HUGE[dtype]]], [group(Sphere())], [{"lr": 1.0}])
    expected = F.projx("sphere", -F.proj("sphere", w.double(), grad.double())).to(dtype)
    # The weight is off the sphere by eps/2 and the product grad * HUGE rounds by as much.
    torch.testing.assert_close(run.params[0], expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("of", "name"), RETRACTIONS, ids=ids)
def test_zero_gradients_change_nothing(of: Manifold, name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        w = place_(of, torch.randn(2, 3, 3, 3).to(dtype), KERNEL)
        rows = [group(of, retraction=name, step_size="general")]
        run = run_steps(step_, [w], [[torch.zeros_like(w)]] * 2, rows, [{"momentum": 0.9}])
        torch.testing.assert_close(run.params[0], w, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_skipped_and_empty_parameters() -> None:
    w = [place_(Sphere(), torch.randn(2, 3, 3, 3), KERNEL) for _ in range(2)] + [torch.zeros(0, 3, 3, 3)]
    rows = [group(Sphere(), parameter=i) for i in range(3)]
    grads: list[list[Tensor | None]] = [[torch.randn_like(w[0]), None, torch.zeros(0, 3, 3, 3)]] * 2
    run = run_steps(step_, w, grads, rows, [{"momentum": 0.9}])
    assert run.steps.tolist()[:2] == [2, 0]
    assert torch.equal(run.params[1], w[1]) and not torch.equal(run.params[0], w[0])
    assert run.momenta[1].abs().max() == 0


def test_gradients_and_what_came_in_are_not_written() -> None:
    w = place_(Stiefel(), torch.randn(2, 3, 3, 3), KERNEL)
    grad = torch.randn_like(w)
    kept = copy(grad)
    run_steps(step_, [w], [[grad]], [group(Stiefel())], [{"momentum": 0.9, "maximize": 1, "nesterov": 1}])
    assert torch.equal(grad, kept)


@pytest.mark.parametrize("of", CURVED, ids=ids)
def test_maximize_is_minimising_the_negative(of: Manifold) -> None:
    w = place_(of, torch.randn(2, 3, 3, 3), KERNEL)
    grads = [torch.randn_like(w) for _ in range(3)]
    up = run_steps(step_, [w], [[g] for g in grads], [group(of)], [{"momentum": 0.9, "maximize": 1}])
    down = run_steps(step_, [w], [[-g] for g in grads], [group(of)], [{"momentum": 0.9}])
    assert torch.equal(up.params[0], down.params[0])


def test_two_parameter_groups_have_their_own_hyper_parameters() -> None:
    w = [place_(Sphere(), torch.randn(2, 3, 3, 3), KERNEL) for _ in range(2)]
    grads = [[torch.randn_like(w[0]), torch.randn_like(w[0])] for _ in range(2)]
    hyper = [{"lr": 0.1}, {"lr": 0.5, "momentum": 0.9}]
    run = run_steps(step_, w, grads, [group(Sphere(), parameter=i, hyper=i) for i in range(2)], hyper)
    for i in range(2):
        alone = run_steps(step_, [w[i]], [[g[i]] for g in grads], [group(Sphere())], [hyper[i]])
        assert torch.equal(run.params[i], alone.params[0])


def test_a_missing_buffer_is_an_error() -> None:
    w = place_(Sphere(), torch.randn(2, 3, 3, 3), KERNEL)
    run = start([w], [group(Sphere())], [{}])
    with pytest.raises(ValueError, match="momenta: wanted shape"):
        run_steps(step_, run, [[w]], [group(Sphere())], [{"momentum": 0.9}])
