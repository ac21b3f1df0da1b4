"""R of [FG] Theorem 1, which a step writes where it is asked for, and Euclidean groups whose step size it bounds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from cpu_lockstep import DTYPES, MOMENTA, Case, arithmetic, arranged, assert_same_bits, check, name_of, on_manifold
from stepping import Run, copy, group, place_, run_steps, start
from torch import Tensor

from manifold_kernels import ops, views
from manifold_kernels.manifolds import BY_NAME, Euclidean, Oblique, ScaleInvariant, Sphere, Stiefel
from manifold_kernels.ops import Step
from manifold_kernels.plan import Group
from manifold_kernels.views import Layout

KERNEL, FLAT = Layout("kernel"), Layout("flat")
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))
    for name, reason in ops.backends().items()
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=BACKENDS)
def step(request: pytest.FixtureRequest) -> Step:
    return ops.resolve(request.param, torch.device("cpu"))


def empty(entries: int) -> Tensor:
    """Where norms go, filled with a number that no group has."""
    return torch.full((entries,), -1.0, dtype=torch.float64)


# --- R ----------------------------------------------------------------------------------------------------------------

#: Functions of a matrix that are constant on the manifold and have independent differentials where they are needed.
CONSTRAINTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sphere": lambda w: w.square().sum().reshape(1),
    "oblique": lambda w: w.square().sum(0),
    "stiefel": lambda w: (w.mT @ w).flatten(),
    "euclidean": lambda w: w.new_zeros(1) * w.sum(),
}


def tangent_length(of: str, w: Tensor, d: Tensor) -> float:
    """The length of d without what would change the constraints, to first order: no formula of a projection."""
    jacobian = torch.autograd.functional.jacobian(CONSTRAINTS[of], w).reshape(-1, w.numel())
    _, sizes, directions = torch.linalg.svd(jacobian)
    rank = int((sizes > 1e-9).sum())
    return float((directions[rank:] @ d.flatten()).norm())


@pytest.mark.parametrize("step_size", ["none", "general"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("of", CONSTRAINTS)
def test_r_is_the_length_of_the_tangent_part_of_the_momentum(step: Step, of: str, scale: float, step_size: str) -> None:
    w = on_manifold(BY_NAME[of](), torch.randn(2, 3, 4, 3, dtype=torch.float64), KERNEL, torch.full((6,), scale))
    grads = [torch.randn_like(w) for _ in range(2)]
    hyper = [{"lr": 0.1, "momentum": 0.9, "dampening": 0.5}]
    for individual in (False, True):
        row = group(of, KERNEL, scale=scale, individual=individual, step_size=step_size)
        run = run_steps(step, [w], [[grads[0]]], [row], hyper)
        before = run.params[0].clone()
        norms = empty(6 if individual else 1)
        run = run_steps(step, run, [[grads[1]]], [row], hyper, norms=norms)
        momentum = 0.9 * grads[0] + 0.5 * grads[1]
        each = [tangent_length(of, x, d) for x, d in zip(before.flatten(0, 1), momentum.flatten(0, 1), strict=True)]
        wanted = torch.tensor(each, dtype=torch.float64)
        # A dozen products of twelve terms on both sides.
        torch.testing.assert_close(norms, wanted if individual else wanted.norm()[None], rtol=1e-13, atol=0)


def test_norms_lie_in_the_order_of_the_plan(step: Step) -> None:
    """Rows of one entry and of one for each component, rows without R between them; each is R of the row alone."""
    convolution = torch.randn(4, 6, 3, 3)
    order = torch.randperm(24)
    parts = order[:7], order[7:12], order[12:13], order[13:]
    kinds = ("stiefel", "sphere", "oblique", "euclidean")
    for of, part in zip(kinds, parts, strict=True):
        batch = views.matrices(convolution, KERNEL)[part][None].clone()
        views.write_matrices(convolution, KERNEL, scatter(convolution, part, place_(of, batch, KERNEL)[0]))
    rows = [
        group("stiefel", "kernel", components=parts[0], individual=True, step_size="general"),
        group("sphere", "kernel", components=parts[1], step_size="general"),
        group(Euclidean(), parameter=1, rule="psi_sgd"),
        group("oblique", "kernel", components=parts[2], individual=True),
        group(Euclidean(), "kernel", components=parts[3], individual=True, step_size="general"),
        group(ScaleInvariant(), parameter=2),
        group(Sphere(), parameter=3, individual=True),
        group(Euclidean(), parameter=4),
        group(Euclidean(), parameter=5, individual=True),
        group(Stiefel(), parameter=6, components=torch.empty(0, dtype=torch.int64)),
        group(Stiefel(), "matrix", parameter=6),
    ]
    params = [
        convolution,
        torch.randn(5),
        torch.randn(3, 4),
        place_(Sphere(), torch.randn(2, 2, 3, 3), KERNEL),
        torch.randn(7),
        torch.randn(2, 3),
        place_(Stiefel(), torch.randn(20, 30), Layout("matrix")),
    ]
    rows[9] = group(Stiefel(), "matrix", parameter=6, components=torch.empty(0, dtype=torch.int64))
    grads: list[Tensor | None] = [torch.randn_like(w) for w in params]
    grads[3] = None
    counts = [row.components.numel() if row.components is not None else 1 for row in rows]
    entries = [count if row.individual else 1 for row, count in zip(rows, counts, strict=True)]
    entries[6] = 4
    norms = empty(sum(entries))
    run_steps(step, params, [grads], rows, [{}], norms=norms)
    found = norms.split(entries)
    for index in (2, 5, 6, 9):
        assert bool(found[index].isnan().all())
    # The gradient of a row, zero elsewhere, in a single group: whatever the others are.
    assert torch.allclose(found[0].norm()[None], alone(step, params, grads, rows[0]), rtol=1e-6)
    assert torch.allclose(found[1], alone(step, params, grads, rows[1]), rtol=1e-6)
    assert torch.allclose(found[3], alone(step, params, grads, rows[3]), rtol=1e-6)
    own = views.matrices(grads[0], KERNEL)[parts[3]].double()
    assert torch.allclose(found[4], own.flatten(1).norm(dim=1), rtol=1e-6)
    for index, parameter in ((7, 4), (8, 5)):
        assert torch.allclose(found[index], grads[parameter].double().norm(), rtol=1e-6)
    assert torch.allclose(found[10], alone(step, params, grads, rows[10]), rtol=1e-6)


def scatter(weight: Tensor, part: Tensor, batch: Tensor) -> Tensor:
    """All components of ``weight``, those of ``part`` replaced."""
    return views.matrices(weight, KERNEL).clone().index_copy(0, part, batch)


def alone(step: Step, params: list[Tensor], grads: list[Tensor | None], row: Group) -> Tensor:
    """R of the whole parameter of ``row``, on its manifold, where the gradient is zero outside of the row."""
    grad = grads[row.parameter]
    assert grad is not None
    grad = grad.clone()
    if row.components is not None:
        batch = torch.zeros_like(views.matrices(grad, row.layout))
        batch[row.components] = views.matrices(grad, row.layout)[row.components]
        views.write_matrices(grad, row.layout, batch)
    norms = empty(1)
    whole = Group(0, 0, "fg_sgd", row.manifold, row.retraction, row.layout)
    run_steps(step, [params[row.parameter]], [[grad]], [whole], [{}], norms=norms)
    return norms


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("step_size", ["none", "general"])
@pytest.mark.parametrize("of", ["sphere", "oblique", "stiefel"])
@pytest.mark.parametrize("shape", [(4, 9, 3, 3), (2, 5, 18, 17)], ids=str)
def test_components_that_do_not_step_have_no_r(
    step: Step, shape: tuple[int, ...], of: str, step_size: str, value: float
) -> None:
    w = place_(BY_NAME[of](), torch.randn(shape), KERNEL)
    grad = torch.randn(shape)
    spoiled = grad.clone()
    spoiled[1, 3, 0, 0], spoiled[0, 2] = value, value
    bad = torch.tensor([2, shape[1] + 3])
    each, some, rest = empty(shape[0] * shape[1]), empty(len(each_kept(shape, bad)) + 2), empty(1)
    individual = group(of, KERNEL, individual=True, step_size=step_size)
    run = run_steps(step, [w], [[spoiled]], [individual], [{"momentum": 0.9}], norms=some)
    run_steps(step, [w], [[grad]], [individual], [{"momentum": 0.9}], norms=each)
    assert run.nonfinite.tolist() == [2]
    kept = each_kept(shape, bad)
    assert bool(some[bad].isnan().all()) and torch.equal(some[kept], each[kept])
    run = run_steps(step, [w], [[spoiled]], [group(of, KERNEL, step_size=step_size)], [{"momentum": 0.9}], norms=rest)
    assert run.nonfinite.tolist() == [2]
    # Squares are summed in float32, a few hundred at a time, or in float64.
    torch.testing.assert_close(rest, each[kept].norm()[None], rtol=1e-6, atol=0)
    # With nothing that steps, a norm of nothing.
    run = run_steps(
        step, [w], [[torch.full_like(w, value)]], [group(of, KERNEL, step_size=step_size)], [{}], norms=rest
    )
    assert rest.tolist() == [0] and run.nonfinite.tolist() == [shape[0] * shape[1]]


def each_kept(shape: tuple[int, ...], bad: Tensor) -> Tensor:
    keep = torch.ones(shape[0] * shape[1], dtype=torch.bool)
    keep[bad] = False
    return keep.nonzero().flatten()


@pytest.mark.parametrize(
    ("of", "view", "shape"),
    [
        ("stiefel", "kernel", (128, 64, 3, 3)),
        ("oblique", "kernel", (64, 64, 3, 5)),
        ("sphere", "filter", (64, 1000)),
        ("oblique", "matrix", (100, 800)),
        ("euclidean", "flat", (300, 300)),
        ("euclidean", "kernel", (64, 64, 3, 3)),
    ],
)
def test_the_same_bits_with_and_without_norms_for_any_number_of_threads(
    of: str, view: str, shape: tuple[int, ...]
) -> None:
    """Groups that fit in a cache and groups that do not, with and without a bound."""
    if ops.extension_error() is not None:
        pytest.skip("the compiled kernels are not there")
    compiled = ops.resolve("cpu", torch.device("cpu"))
    layout = Layout(view)
    w = torch.randn(shape) if of == "euclidean" else place_(BY_NAME[of](), torch.randn(shape), layout)
    count = views.shape_of(w, layout).count
    grads = [[torch.randn(shape) / math.sqrt(w.numel())] for _ in range(3)]
    for individual, step_size in itertools.product((False, True), ("none", "general")):
        runs, found = [], []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            row = group(of, layout, individual=individual, step_size=step_size)
            norms = empty(count if individual else 1)
            runs.append(run_steps(compiled, [w], grads, [row], [{"momentum": 0.9}]))
            runs.append(run_steps(compiled, [w], grads, [row], [{"momentum": 0.9}], norms=norms))
            found.append(norms)
        for run in runs[1:]:
            assert_same_bits(runs[0], run)
        assert torch.equal(*found) and bool((found[0] > 0).all())


# --- Euclidean groups -------------------------------------------------------------------------------------------------


def sgd(w: Tensor, grads: list[Tensor], hyper: dict[str, float]) -> tuple[Tensor, Tensor | None]:
    """The weight and buffer of ``torch.optim.SGD`` after one step from w for each gradient, w put back between."""
    parameter = torch.nn.Parameter(copy(w))
    options = {"dampening": 0.0, "weight_decay": 0.0, "momentum": 0.0, **hyper}
    flags = {name: bool(options.pop(name, 0)) for name in ("nesterov", "maximize")}
    optimizer = torch.optim.SGD([parameter], foreach=False, fused=False, **flags, **options)
    for grad in grads:
        with torch.no_grad():
            parameter.copy_(w)
        parameter.grad = copy(grad)
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter].get("momentum_buffer")


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("options", [*MOMENTA, {"momentum": 0.9, "weight_decay": 0.1}, {"weight_decay": 0.1}], ids=str)
def test_a_bounded_step_is_sgds_divided_by_tau(step: Step, options: dict[str, float], size: float) -> None:
    """Corollary 2 on the Euclidean space: torch's own direction and buffer, shortened by ``max(1, R (2 + R))``."""
    w = torch.randn(6, 5, 3, 3, dtype=torch.float64)
    grad = torch.randn_like(w) * size / math.sqrt(w.numel())
    hyper = {"lr": 0.7, **options}
    moved, buffer = sgd(w, [grad], hyper)
    for layout, individual in ((FLAT, False), (FLAT, True), (KERNEL, False), (KERNEL, True)):
        norms = empty(30 if individual and layout == KERNEL else 1)
        rows = [group(Euclidean(), layout, individual=individual, step_size="general")]
        run = run_steps(step, [w], [[grad]], rows, [hyper], norms=norms)
        taken = views.matrices(w - run.params[0], layout).flatten(1)
        whole = views.matrices(w - moved, layout).flatten(1)
        r = whole.norm(dim=1) / 0.7 if individual else whole.norm()[None] / 0.7
        # Differences of weights of up to 4, each with a rounding of its own; a norm has 270 of them.
        rounding = 4 * torch.finfo(w.dtype).eps
        torch.testing.assert_close(norms, r, rtol=1e-13, atol=math.sqrt(270) * rounding)
        tau = (r * (2 + r)).clamp(min=1)[:, None]
        torch.testing.assert_close(taken, whole / tau, rtol=1e-12, atol=2 * rounding)
        length = taken.norm(dim=1) if individual else taken.norm()
        assert float(length.max()) <= (math.sqrt(2) - 1) * 0.7 * (1 + 1e-9)
        if buffer is not None:
            assert torch.equal(run.momenta[0], buffer)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_bounded_groups_against_the_reference(dtype: torch.dtype) -> None:
    """All layouts in memory, long tensors in pieces, listed kernels and filters, every option of the momentum."""
    if ops.extension_error() is not None:
        pytest.skip("the compiled kernels are not there")
    turn = itertools.cycle(
        itertools.product((False, True), [*MOMENTA, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": 1}])
    )
    for shape, layout, arrangement, grads in [
        ((37,), FLAT, "misaligned", "strided"),
        ((1,), FLAT, "contiguous", "contiguous"),
        ((5, 7, 3, 3), FLAT, "channels_last", "contiguous"),
        ((300, 200), FLAT, "contiguous", "contiguous"),
        ((5, 7, 3, 3), KERNEL, "contiguous", "contiguous"),
        ((5, 20, 3, 3), KERNEL, "channels_last", "channels_last"),
        ((64, 70, 3, 3), KERNEL, "contiguous", "expanded"),
        ((5, 7, 3, 3), Layout("filter"), "gaps", "transposed"),
        ((6, 40, 3, 3), Layout("filter"), "contiguous", "contiguous"),
        ((6, 4, 3, 3), Layout("matrix"), "transposed", "contiguous"),
    ]:
        individual, options = next(turn)
        weight = arranged(torch.randn(shape, dtype=torch.float64).to(dtype), arrangement)
        count = views.shape_of(weight, layout).count
        parts = [None] if count < 3 else [*torch.randperm(count).tensor_split(3)]
        rows = [
            group(Euclidean(), layout, components=part, individual=individual, step_size="general") for part in parts
        ]
        check(Case(weight, rows, {"lr": 0.3, **options}, grad_size=0.1, grad_arrangement=grads))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("arrangement", ["contiguous", "channels_last"])
def test_a_product_of_all_manifolds_in_one_tensor(arrangement: str, dtype: torch.dtype) -> None:
    """[FG] collections: every kernel of a layer dealt at random to sphere, oblique, Stiefel and Euclidean groups."""
    if ops.extension_error() is not None:
        pytest.skip("the compiled kernels are not there")
    shape = (12, 24, 3, 3)
    for seed, individual in ((0, False), (1, True), (2, False)):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(shape, generator=generator, dtype=torch.float64)
        batch = views.matrices(weight, KERNEL).clone()
        rows = []
        for index, part in enumerate(torch.randperm(288, generator=generator).tensor_split(12)):
            of = ("sphere", "oblique", "stiefel", "euclidean")[index % 4]
            own = batch[part][:, None].clone()
            scales = torch.rand(len(part), generator=generator, dtype=torch.float64) + 0.5
            batch[part] = on_manifold(BY_NAME[of](), own, KERNEL, scales)[:, 0]
            rows.append(group(of, "kernel", components=part, scale=scales, individual=individual, step_size="general"))
        views.write_matrices(weight, KERNEL, batch)
        hyper = {"lr": 0.2, **MOMENTA[seed + 1]}
        check(Case(arranged(weight.to(dtype), arrangement), rows, hyper, grad_size=0.5, grad_arrangement=arrangement))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_bound_leaves_out_what_is_not_finite(step: Step, dtype: torch.dtype, value: float) -> None:
    """A gradient, a weight, a momentum beyond its type: the kernel stays as it was and does not count in R."""
    w, grads = torch.randn(4, 5, 3, 3).to(dtype), [torch.randn(4, 5, 3, 3).to(dtype) for _ in range(2)]
    w[3, 3, 1, 1] = value
    grads[1][0, 1, 2, 0], grads[1][2, 0] = value, -value
    largest = torch.finfo(dtype).max
    grads[0][1, 1, 0, 0] = grads[1][1, 1, 0, 0] = largest  # 1.9 times as much is no number
    bad = torch.tensor([1, 6, 10, 18])
    keep = each_kept((4, 5), bad)
    hyper = [{"momentum": 0.9, "lr": 0.1}]
    for individual in (False, True):
        rows = [group(Euclidean(), KERNEL, individual=individual, step_size="general")]
        once = run_steps(step, [w], [[grads[0]]], rows, hyper)
        before = Run([copy(once.params[0])], [copy(once.momenta[0])], [], once.steps.clone(), once.nonfinite.clone())
        norms = empty(20 if individual else 1)
        run = run_steps(step, once, [[grads[1]]], rows, hyper, norms=norms)
        assert run.nonfinite.tolist() == [1 + 4]
        for now, old in ((run.params, before.params), (run.momenta, before.momenta)):
            changed = [views.matrices(t[0], KERNEL).nan_to_num(7.0) for t in (now, old)]
            assert torch.equal(changed[0][bad], changed[1][bad])
            assert not torch.equal(changed[0][keep], changed[1][keep])
        own = views.matrices(run.momenta[0], KERNEL).double()[keep].flatten(1).norm(dim=1)
        if individual:
            assert bool(norms[bad].isnan().all())
        torch.testing.assert_close(norms[keep] if individual else norms, own if individual else own.norm()[None])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_long_tensor_stays_as_a_whole(step: Step, value: float) -> None:
    """One component whose last element, in the last of many pieces, is not finite."""
    w, grad = torch.randn(300, 200), torch.randn(300, 200)
    grad[-1, -1] = value
    for individual in (False, True):
        rows, norms = [group(Euclidean(), individual=individual, step_size="general")], empty(1)
        run = run_steps(step, [w], [[grad]], rows, [{"momentum": 0.9}], fill=3.0, norms=norms)
        assert run.nonfinite.tolist() == [1] and run.steps.tolist() == [1]
        assert torch.equal(run.params[0], w) and bool((run.momenta[0] == 3).all())
        assert norms.isnan().tolist() == [individual] and (individual or norms.tolist() == [0])


@pytest.mark.parametrize("layout", [FLAT, KERNEL], ids=str)
@pytest.mark.parametrize("individual", [False, True])
def test_without_a_bound_what_is_not_finite_is_written_as_torch_does(
    step: Step, individual: bool, layout: Layout
) -> None:
    w, grad = torch.randn(4, 5, 3, 3), torch.randn(4, 5, 3, 3)
    grad[1, 2, 0, 0] = math.inf
    expected, _ = sgd(w, [grad], {"lr": 0.1})
    norms = empty(20 if individual and layout == KERNEL else 1)
    run = run_steps(step, [w], [[grad]], [group(Euclidean(), layout, individual=individual)], [{}], norms=norms)
    assert torch.equal(run.params[0], expected) and run.nonfinite.tolist() == [0]
    wanted = views.matrices(grad, layout).double().flatten(1).norm(dim=1) if individual else torch.tensor([math.inf])
    wanted = torch.where(wanted.isfinite(), wanted, math.nan).double()
    torch.testing.assert_close(norms, wanted, equal_nan=True, rtol=1e-12, atol=0)


# --- The operator's argument ------------------------------------------------------------------------------------------

WRONG = {
    "too few": torch.zeros(4, dtype=torch.float64),
    "too many": torch.zeros(6, dtype=torch.float64),
    "dtype": torch.zeros(5),
    "dimensions": torch.zeros(5, 1, dtype=torch.float64),
}


@pytest.mark.parametrize("norms", WRONG.values(), ids=WRONG)
def test_wrong_norms_raise_before_anything_is_written(step: Step, norms: Tensor) -> None:
    w = place_(Oblique(), torch.randn(2, 2, 3, 3), KERNEL)
    params, rows = [w, torch.randn(3)], [group(Oblique(), individual=True), group(Euclidean(), parameter=1)]
    run = start(params, rows, [{"momentum": 0.9}], fill=2.0)
    with pytest.raises(ValueError, match="norms: wanted"):
        run_steps(step, run, [[torch.randn_like(p) for p in params]], rows, [{"momentum": 0.9}], norms=norms)
    assert run.steps.tolist() == [0, 0] and all(torch.equal(p, q) for p, q in zip(run.params, params, strict=True))
    assert all(bool((m == 2).all()) for m in run.momenta)


def test_strided_norms_are_refused_by_the_kernels() -> None:
    if ops.extension_error() is not None:
        pytest.skip("the compiled kernels are not there")
    compiled = ops.resolve("cpu", torch.device("cpu"))
    with pytest.raises(ValueError, match="norms: wanted a contiguous CPU tensor"):
        run_steps(
            compiled,
            [torch.randn(2, 3)],
            [[torch.randn(2, 3)]],
            [group(Euclidean(), Layout("filter"), individual=True)],
            [{}],
            norms=torch.zeros(4, dtype=torch.float64)[::2],
        )


def test_the_schema_says_what_is_written() -> None:
    """Torch's own check: nothing is changed that the schema does not name, and the fake kernel takes the arguments."""
    if ops.extension_error() is not None:
        pytest.skip("the compiled kernels are not there")
    seen: list[tuple[object, ...]] = []
    w = place_(Sphere(), torch.randn(2, 2, 3, 3), KERNEL)
    for norms in (None, empty(1)):
        run_steps(lambda *args: seen.append(args), [w], [[w.clone()]], [group(Sphere())], [{}], norms=norms)
    for args in seen:
        torch.library.opcheck(
            torch.ops.manifold_kernels.step_.default, args, test_utils=("test_schema", "test_faketensor")
        )


def test_a_float32_norm_is_right_to_its_roundings(step: Step) -> None:
    """65,536 kernels in float32: R does not drift with the number of components."""
    w = place_(Sphere(), torch.randn(256, 256, 3, 3), KERNEL)
    grad, norms = torch.randn_like(w), [empty(1), empty(1)]
    for dtype, out in zip((torch.float32, torch.float64), norms, strict=True):
        run_steps(step, [w.to(dtype)], [[grad.to(dtype)]], [group(Sphere())], [{}], norms=out)
    # Roundings of single squares average out, those of the sum are compensated or in float64.
    torch.testing.assert_close(*norms, rtol=arithmetic(torch.float32), atol=0)
