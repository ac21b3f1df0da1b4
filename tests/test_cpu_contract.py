"""What the compiled operator promises beside its numbers: degenerate input, equal bits, threads, errors, one call."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cpu_lockstep import DTYPES, FG, VECTOR_RULES, arithmetic, call, clone, compiled, name_of, on_manifold
from stepping import Run, group, hyper_table, like, place_, run_steps, start
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from manifold_kernels import manifolds, ops, plan, views
from manifold_kernels.manifolds import BY_NAME, Grassmann, Oblique, ScaleInvariant, Sphere, Stiefel
from manifold_kernels.plan import GROUP_COLUMNS, HYPER_COLUMNS, Plan
from manifold_kernels.reference.registry import GEOMETRIES
from manifold_kernels.views import Layout

if (missing := ops.extension_error()) is not None:
    pytest.skip(f"the compiled kernels are not there: {missing}", allow_module_level=True)

KERNEL, FILTER, MATRIX = Layout("kernel"), Layout("filter"), Layout("matrix")
NAMES = {"ids": name_of}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


#: One weight for each way through the kernels: registers of matrices of a fixed and of any size, long vectors, larger
#: matrices, torch's linear algebra, in groups that fit in a cache and in one that does not.
ENGINES: list[tuple[str, str, tuple[int, ...], Layout]] = [
    *((of, option, (4, 9, 3, 3), KERNEL) for of, option in FG),
    *((of, option, (4, 9, 2, 3), KERNEL) for of, option in FG if of == "stiefel"),
    *(
        (of, option, (6, 30, 3, 3), FILTER)
        for of, option in [("sphere", "projection"), ("sphere", "exp"), *VECTOR_RULES]
    ),
    ("oblique", "projection", (2, 9, 40, 10), KERNEL),
    ("oblique", "exp", (2, 9, 40, 10), KERNEL),
    *((of, option, (2, 3, 18, 17), KERNEL) for of, option in FG if of == "stiefel"),
    ("stiefel", "qr", (1, 3, 64, 20), KERNEL),
    ("stiefel", "qr", (3, 16, 17, 33), KERNEL),
    ("sphere", "projection", (64, 60, 3, 3), KERNEL),
    ("stiefel", "qr", (64, 60, 3, 3), KERNEL),
    ("oblique", "projection", (64, 60, 3, 3), KERNEL),
    ("sphere", "exp", (40, 1000), FILTER),
]


def weight_of(of: str, shape: tuple[int, ...], layout: Layout, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(shape, dtype=torch.float64)
    return on_manifold(BY_NAME[of](), weight, layout, torch.ones(views.shape_of(weight, layout).count)).to(dtype)


def row(of: str, option: str, layout: Layout, **rest: object) -> plan.Group:
    if (of, option) in FG:
        return group(of, layout, retraction=option, **rest)
    return group(of, layout, rule=option)


def read(tensor: Tensor, layout: Layout) -> Tensor:
    return views.matrices(tensor, layout)


def violation(of: str, weight: Tensor, layout: Layout) -> float:
    """In float64; the scale is 1."""
    return float(GEOMETRIES[BY_NAME[of].code].violation(read(weight, layout).double(), 1.0).max())


def landing(of: str, layout: Layout, weight: Tensor) -> float:
    """How far off the manifold rounding may leave a point.

    Rounding the elements to their type (eps/2 each, relative) changes norms by eps/2 and elements of a Gram matrix by
    eps. Roundings of the arithmetic, eps/2 each: a norm is the root of a sum in double or of at most 64 terms; an
    element of an orthonormal matrix has passed n + p rotations, or products of as many terms, and the Gram matrix
    doubles what is left of them.
    """
    shape = views.shape_of(weight, layout)
    terms = shape.n + shape.p if of == "stiefel" else 8
    return torch.finfo(weight.dtype).eps + (3 + terms) * arithmetic(weight.dtype)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("individual", [False, True])
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_neighbours_of_a_non_finite_gradient_keep_their_bits(
    engine: tuple[str, str, tuple[int, ...], Layout], individual: bool, value: float
) -> None:
    """A component with NaN or Inf stays, is counted, and the others step as with a zero gradient in its place: nothing
    is added to R, nothing is lost in the lanes beside it."""
    of, option, shape, layout = engine
    fg = (of, option) in FG
    if individual and not fg:
        return
    hyper = [{"momentum": 0.9, "lr": 0.1}]
    for dtype in (torch.float32, torch.bfloat16):
        w = weight_of(of, shape, layout, dtype)
        rows = [row(of, option, layout, **({"individual": individual, "step_size": "general"} if fg else {}))]
        good, grad = torch.randn_like(w), torch.randn_like(w)
        once = run_steps(compiled, [w], [[good]], rows, hyper)
        count = views.shape_of(w, layout).count
        bad = sorted({0, count // 3, count - 1})
        batch, zero = read(grad, layout).clone(), read(grad, layout).clone()
        for k in bad:
            batch[k, -1, -1], zero[k] = value, 0
        spoiled, zeroed = like(w), like(w)
        views.write_matrices(spoiled, layout, batch)
        views.write_matrices(zeroed, layout, zero)
        run = run_steps(compiled, clone(once), [[spoiled]], rows, hyper)
        # With momentum a zero gradient still moves; without the buffer's part it adds nothing to R.
        start_over = clone(once)
        keep = torch.ones(count, dtype=torch.bool)
        keep[bad] = False
        buffer = read(start_over.momenta[0], layout).clone()
        buffer[bad] = 0
        views.write_matrices(start_over.momenta[0], layout, buffer)
        other = run_steps(compiled, start_over, [[zeroed]], rows, hyper)
        assert run.nonfinite.tolist() == [len(bad)]
        for now, before, without in (
            (run.params, once.params, other.params),
            (run.momenta, once.momenta, other.momenta),
        ):
            now_, before_, without_ = (read(t[0], layout) for t in (now, before, without))
            assert torch.equal(now_[bad], before_[bad])
            assert torch.equal(now_[keep], without_[keep])
        if option == "adam_g":
            assert torch.equal(run.variances[0][bad], once.variances[0][bad])
            assert torch.equal(run.variances[0][keep], other.variances[0][keep])


@pytest.mark.parametrize("engine", [e for e in ENGINES if (e[0], e[1]) in FG], ids=str)
def test_neighbours_of_a_huge_gradient_keep_their_bits(engine: tuple[str, str, tuple[int, ...], Layout]) -> None:
    """One component of a register leaves its range, or steps very far: the others do not feel it."""
    of, option, shape, layout = engine
    w = weight_of(of, shape, layout, torch.float32)
    grad = torch.randn_like(w)
    rows = [row(of, option, layout, individual=True)]
    expected = read(run_steps(compiled, [w], [[grad]], rows, [{}]).params[0], layout)
    for size in (1e3, 1e6, 1e18, 1e30, 1e38):
        batch = read(grad, layout).clone()
        batch[1] *= size / batch[1].abs().max()
        spoiled = like(w)
        views.write_matrices(spoiled, layout, batch)
        run = run_steps(compiled, [w], [[spoiled]], rows, [{}])
        got = read(run.params[0], layout)
        keep = torch.arange(len(got)) != 1
        if option in ("polar", "cayley", "exp") and shape[-1] == 17:
            # A batch of torch's linear algebra takes one way for all: the other way differs by its roundings.
            torch.testing.assert_close(got[keep], expected[keep], rtol=0, atol=35 * torch.finfo(torch.float32).eps)
        else:
            assert torch.equal(got[keep], expected[keep])
        assert run.nonfinite.tolist() == [0]
        assert violation(of, run.params[0], layout) <= landing(of, layout, w)


HUGE = {torch.float32: (1e30, 3e38), torch.float64: (1e200, 1e308), torch.bfloat16: (1e30, 3e38), torch.float16: (6e4,)}


@pytest.mark.parametrize("dtype", DTYPES, **NAMES)
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_huge_gradients(engine: tuple[str, str, tuple[int, ...], Layout], dtype: torch.dtype) -> None:
    """Finite gradients leave finite weights, on the manifold; only what a buffer cannot hold is left alone."""
    of, option, shape, layout = engine
    for size in HUGE[dtype]:
        for options in ({}, {"momentum": 0.5}, {"momentum": 0.5, "nesterov": 1}):
            if ((of, option) not in FG and "nesterov" in options) or (option == "adam_g" and not options):
                continue
            for step_size in ("none", "general") if (of, option) in FG else ("none",):
                w = weight_of(of, shape, layout, dtype)
                rest = {"step_size": step_size} if (of, option) in FG else {}
                grads = [[(torch.rand(w.shape, dtype=torch.float64) * size * s).to(dtype)] for s in (1, -0.4)]
                run = run_steps(compiled, [w], grads, [row(of, option, layout, **rest)], [{"lr": 0.5, **options}])
                assert bool(run.params[0].isfinite().all())
                if of != "scale_invariant":
                    assert run.nonfinite.tolist() == [0]
                    assert violation(of, run.params[0], layout) <= landing(of, layout, w)
                    assert step_size == "general" or not torch.equal(run.params[0], w)


@pytest.mark.parametrize("lr", [1e3, 1e8, 1e20])
@pytest.mark.parametrize("dtype", DTYPES, **NAMES)
@pytest.mark.parametrize("engine", [e for e in ENGINES if (e[0], e[1]) in FG], ids=str)
def test_steps_that_lose_the_weight(
    engine: tuple[str, str, tuple[int, ...], Layout], dtype: torch.dtype, lr: float
) -> None:
    """W + V is V to rounding, which for a square V, the product of W and a skew matrix, or for gradients of rank one
    has not full rank: the next weight is on the manifold all the same."""
    of, option, shape, layout = engine
    w = weight_of(of, shape, layout, dtype)
    rank_one = torch.ones(shape, dtype=torch.float64) * torch.randn(shape[0], *[1] * (len(shape) - 1))
    grads = [[torch.randn(shape).to(dtype)], [rank_one.to(dtype)], [like(w, 1.0)]]
    run = run_steps(compiled, [w], grads, [row(of, option, layout)], [{"lr": lr}])
    assert run.nonfinite.tolist() == [0]
    assert violation(of, run.params[0], layout) <= landing(of, layout, w)


@pytest.mark.parametrize("dtype", DTYPES, **NAMES)
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_zero_and_denormal_gradients(engine: tuple[str, str, tuple[int, ...], Layout], dtype: torch.dtype) -> None:
    """A step of no length ends where it began, to the roundings of a retraction."""
    of, option, shape, layout = engine
    w = weight_of(of, shape, layout, dtype)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for fill in (0.0, smallest):
        run = run_steps(compiled, [w], [[like(w, fill)]] * 2, [row(of, option, layout)], [{"momentum": 0.9}])
        assert run.nonfinite.tolist() == [0]
        # A rounding to the storage type more or less, and what brings a rounded weight back to the manifold.
        info = torch.finfo(dtype)
        off = 0.0 if of == "scale_invariant" else violation(of, w, layout)
        bound = (
            info.eps * w.double().abs() + 2 * off + landing(of, layout, w) * (info.bits > 16) + 4 * arithmetic(dtype)
        )
        if of == "scale_invariant":
            # Two steps of lr ||w||^2 g and their momentum, where ||w||^2 is about 270.
            bound = bound + 3 * 0.1 * float(read(w, layout).double().square().sum((-2, -1)).max()) * fill
        assert bool(((run.params[0].double() - w.double()).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, **NAMES)
def test_zero_weights(dtype: torch.dtype) -> None:
    """Columns and vectors without direction: the projected gradient gives them one, and without it they stay."""
    for of, shape, layout in [
        ("oblique", (2, 9, 3, 3), KERNEL),
        ("sphere", (6, 300), FILTER),
        ("oblique", (3, 70), MATRIX),
    ]:
        for grad_is_zero in (True, False):
            w = weight_of(of, shape, layout, dtype)
            w[0] = 0
            grad = torch.zeros_like(w) if grad_is_zero else torch.randn_like(w)
            run = run_steps(compiled, [w], [[grad]], [group(of, layout)], [{}])
            assert bool(run.params[0].isfinite().all()) and run.nonfinite.tolist() == [0]
            if grad_is_zero:
                assert float(run.params[0][0].abs().max()) == 0
    w = torch.zeros(3, 5, dtype=dtype)
    run = run_steps(compiled, [w], [[torch.ones_like(w)]], [group(ScaleInvariant())], [{"momentum": 0.9}])
    assert float(run.params[0].abs().max()) == 0 and run.nonfinite.tolist() == [0]
    # A zero row on G(1, n) takes the direction of its first step, which is against the gradient.
    rows = [row("grassmann", "sgd_g", FILTER)]
    run = run_steps(compiled, [w], [[torch.ones_like(w)]], rows, [{"momentum": 0.9, "clip": 0.1}])
    wanted = torch.full((3, 5), -(5**-0.5), dtype=torch.float64)
    assert torch.allclose(run.params[0].double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_momentum_that_float16_cannot_hold(engine: tuple[str, str, tuple[int, ...], Layout]) -> None:
    """60000 + 0.9 * 60000 is finite where it is computed, infinite where it would be stored."""
    of, option, shape, layout = engine
    if (of, option) not in FG:
        return
    w = weight_of(of, shape, layout, torch.float16)
    grad = torch.randn_like(w)
    batch = read(grad, layout).clone()
    batch[1, 0, 0] = 60000
    views.write_matrices(grad, layout, batch)
    rows, hyper = [row(of, option, layout, step_size="general")], [{"momentum": 0.9}]
    once = run_steps(compiled, [w], [[grad]], rows, hyper)
    run = run_steps(compiled, clone(once), [[grad]], rows, hyper)
    assert once.nonfinite.tolist() == [0] and run.nonfinite.tolist() == [1]
    for now, before in ((run.params, once.params), (run.momenta, once.momenta)):
        assert torch.equal(read(now[0], layout)[1], read(before[0], layout)[1])
    assert not torch.equal(read(run.momenta[0], layout)[0], read(once.momenta[0], layout)[0])
    assert bool(run.params[0].isfinite().all() and run.momenta[0].isfinite().all())


def test_psi_keeps_what_cannot_be_stored() -> None:
    """u beyond float32's range stays; without a buffer only the weight must be stored, and the guard brings it back."""
    w = torch.randn(4, 30)
    grads = [[w.sign() * 3e38]]
    for guard, momentum, left in [(1e4, 0.0, 0), (math.inf, 0.0, 4), (1e4, 0.9, 4)]:
        hyper = [{"lr": 1.0, "guard": guard, "momentum": momentum}]
        run = run_steps(compiled, [w], grads, [group(ScaleInvariant())], hyper)
        assert run.nonfinite.tolist() == [left]
        assert bool(run.params[0].isfinite().all())
        assert torch.equal(run.params[0], w) == (left > 0)


def test_nothing_to_do() -> None:
    """No parameters, no gradients, no elements, no components."""
    run_steps(compiled, [], [[]], [], [{}])
    w = [place_(Sphere(), torch.randn(2, 3, 3, 3), KERNEL) for _ in range(2)] + [torch.zeros(0, 3, 3, 3)]
    rows = [group(Sphere(), parameter=i) for i in range(3)]
    rows.insert(0, group(Stiefel(), parameter=0, components=torch.empty(0, dtype=torch.int64)))
    grads: list[list[Tensor | None]] = [[torch.randn_like(w[0]), None, torch.zeros(0, 3, 3, 3)]] * 2
    run = run_steps(compiled, w, grads, rows, [{"momentum": 0.9}], fill=math.nan)
    assert run.steps.tolist() == [2, 0, 2]
    assert torch.equal(run.params[1], w[1]) and not torch.equal(run.params[0], w[0])
    assert bool(run.momenta[1].isnan().all())


def test_buffers_are_not_read_before_the_first_step_nor_used_without_momentum() -> None:
    for of, option, shape, layout in ENGINES[:16]:
        w = weight_of(of, shape, layout, torch.float32)
        grad = torch.randn_like(w)
        rows, hyper = [row(of, option, layout)], [{"momentum": 0.9}]
        clean = run_steps(compiled, [w], [[grad]], rows, hyper)
        spoiled = run_steps(compiled, [w], [[grad]], rows, hyper, fill=math.nan)
        assert torch.equal(clean.params[0], spoiled.params[0]) and torch.equal(clean.momenta[0], spoiled.momenta[0])
        if option == "adam_g":
            continue
        plain = run_steps(compiled, clone(clean), [[grad]], rows, [{"momentum": 0.0, "dampening": 0.5}])
        assert torch.equal(plain.momenta[0], clean.momenta[0])
        bare = clone(clean)
        bare.momenta[0] = w.new_empty(0)
        assert torch.equal(run_steps(compiled, bare, [[grad]], rows, [{}]).params[0], plain.params[0])


# --- Determinism and threads ------------------------------------------------------------------------------------------

LARGE = [
    ("sphere", "projection", (256, 256, 3, 3), KERNEL, {}),
    ("stiefel", "qr", (256, 256, 3, 3), KERNEL, {"individual": True}),
    ("stiefel", "qr", (256, 256, 3, 3), KERNEL, {}),
    ("oblique", "projection", (256, 256, 3, 3), KERNEL, {}),
    ("sphere", "projection", (512, 4608), FILTER, {}),
    ("oblique", "projection", (512, 1024), MATRIX, {}),
    ("scale_invariant", "psi_sgd", (512, 4608), FILTER, {}),
    ("grassmann", "adam_g", (512, 4608), FILTER, {}),
    ("stiefel", "polar", (256, 64, 1, 1), MATRIX, {}),
    ("stiefel", "qr", (24, 16, 33, 20), KERNEL, {}),
    ("stiefel", "qr", (24, 16, 33, 20), KERNEL, {"individual": True}),
    ("stiefel", "qr", (1, 2, 210, 190), KERNEL, {"step_size": "general"}),
    ("stiefel", "qr", (300, 333, 1, 1), MATRIX, {"step_size": "general"}),
    ("stiefel", "polar", (8, 8, 24, 24), KERNEL, {}),
    ("euclidean", "add", (256, 256, 3, 3), Layout("flat"), {}),
]


def large_run(case: tuple[str, str, tuple[int, ...], Layout, dict[str, object]], dtype: torch.dtype) -> Run:
    of, option, shape, layout, rest = case
    torch.manual_seed(5)
    w = torch.randn(shape)
    if of != "euclidean":
        w /= math.sqrt(w[0].numel())
    if of == "stiefel" and layout is KERNEL:
        w.copy_(torch.eye(*shape[2:]))
    elif of not in ("euclidean", "scale_invariant"):
        place_(of, w, layout, 1.0)
    w = w.to(dtype)
    rows = [group(of, layout, retraction=option, **rest)] if of != "euclidean" and (of, option) in FG else []
    rows = rows or [group(of, layout, rule=option if of in ("scale_invariant", "grassmann") else None)]
    return run_steps(compiled, [w], [[torch.randn(shape).to(dtype)] for _ in range(2)], rows, [{"momentum": 0.9}])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], **NAMES)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: "-".join(str(x) for x in case[:3]))
def test_the_same_bits_for_every_run_and_number_of_threads(
    case: tuple[str, str, tuple[int, ...], Layout, dict[str, object]], dtype: torch.dtype
) -> None:
    runs = []
    # The BLAS behind torch adds in another order for another number of threads; its runs repeat themselves.
    library = case[2:4] == ((256, 64, 1, 1), MATRIX)
    for threads in (2, 2, 2) if library else (1, 2, 3, 2):
        torch.set_num_threads(threads)
        runs.append(large_run(case, dtype))
    torch.set_num_threads(1)
    for run in runs[1:]:
        assert torch.equal(run.params[0], runs[0].params[0])
        assert torch.equal(run.momenta[0], runs[0].momenta[0])


def ticks() -> dict[str, int]:
    """Processor time of every thread of this process so far, in clock ticks."""
    times = {}
    for thread in Path("/proc/self/task").iterdir():
        fields = (thread / "stat").read_text().rpartition(")")[2].split()
        times[thread.name] = int(fields[11]) + int(fields[12])
    return times


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_two_threads_share_a_step() -> None:
    """Compiled without OpenMP, torch's parallel_for runs on one thread and says nothing."""
    torch.set_num_threads(2)
    w = torch.randn(512, 512, 3, 3)
    grad, rows, hyper = torch.randn_like(w), [group("euclidean")], [{"momentum": 0.9}]
    run, of, table = start([w], rows, hyper), Plan.build(rows, [w]), hyper_table(hyper)
    time.sleep(0.3)  # threads of the lines above look for work a little longer
    before, own = ticks(), str(threading.get_native_id())
    for _ in range(3000):
        call(compiled, run, [grad], of, table)
        if worked := [t for t, time_now in ticks().items() if time_now > before.get(t, 0) + 5 and t != own]:
            break
    torch.set_num_threads(1)
    assert worked, "no thread but the caller's has worked"


# --- Errors -----------------------------------------------------------------------------------------------------------


def arguments() -> list[object]:
    """A valid call: a sphere and an Adam-G weight."""
    w = [place_(Sphere(), torch.randn(2, 3, 3, 3), KERNEL), place_(Grassmann(), torch.randn(4, 9), FILTER)]
    rows = [group(Sphere(), parameter=0), group(Grassmann(), parameter=1, rule="adam_g")]
    hyper = [{"momentum": 0.9}]
    run, of = start(w, rows, hyper), Plan.build(rows, w)
    grads: list[Tensor | None] = [torch.randn_like(p) for p in w]
    return [
        run.params,
        grads,
        run.momenta,
        run.variances,
        run.steps,
        run.nonfinite,
        of.groups,
        of.components,
        of.scales,
        hyper_table(hyper),
    ]


PARAMS, GRADS, MOMENTA, VARIANCES, STEPS, NONFINITE, GROUPS, COMPONENTS, SCALES, HYPER = range(10)


def put(position: int, value: object) -> Callable[[list[object]], None]:
    def change(args: list[object]) -> None:
        args[position] = value

    return change


def put_in(position: int, index: int, value: Callable[[Tensor], Tensor]) -> Callable[[list[object]], None]:
    def change(args: list[object]) -> None:
        args[position][index] = value(args[position][index])  # type: ignore[index]

    return change


def put_column(name: str, value: int, index: int = 0) -> Callable[[list[object]], None]:
    def change(args: list[object]) -> None:
        args[GROUPS][index, GROUP_COLUMNS.index(name)] = value  # type: ignore[index]

    return change


WRONG: list[tuple[str, str, Callable[[list[object]], None]]] = [
    ("fewer gradients", "grads, momenta, variances", lambda args: args[GRADS].pop()),  # type: ignore[attr-defined]
    ("fewer momenta", "grads, momenta, variances", lambda args: args[MOMENTA].pop()),  # type: ignore[attr-defined]
    ("fewer variances", "grads, momenta, variances", lambda args: args[VARIANCES].pop()),  # type: ignore[attr-defined]
    ("integer weight", "params", put_in(PARAMS, 1, lambda t: t.int())),
    ("gradient's shape", r"grads\[1\]", put_in(GRADS, 1, lambda t: t[:2])),
    ("gradient's dtype", r"grads\[1\]", put_in(GRADS, 1, lambda t: t.double())),
    ("momentum's shape", r"momenta\[1\]", put_in(MOMENTA, 1, lambda t: t[:2])),
    ("momentum's strides", r"momenta\[1\]", put_in(MOMENTA, 1, lambda t: t.T.contiguous().T)),
    ("momentum's dtype", r"momenta\[1\]", put_in(MOMENTA, 1, lambda t: t.double())),
    ("no momentum", r"momenta\[1\]", put_in(MOMENTA, 1, lambda t: t.new_empty(0))),
    ("no momentum where asked for", r"momenta\[0\]", put_in(MOMENTA, 0, lambda t: t.new_empty(0))),
    ("variances' number", r"variances\[1\]", put_in(VARIANCES, 1, lambda t: t[:3])),
    ("variances' dtype", r"variances\[1\]", put_in(VARIANCES, 1, lambda t: t.double())),
    ("variances' strides", r"variances\[1\]", put_in(VARIANCES, 1, lambda t: torch.zeros(8)[::2])),
    ("steps' number", "steps", put(STEPS, torch.zeros(3, dtype=torch.int64))),
    ("steps' dtype", "steps", put(STEPS, torch.zeros(2))),
    ("nonfinite's number", "nonfinite", put(NONFINITE, torch.zeros(1, dtype=torch.int64))),
    ("nonfinite's dtype", "nonfinite", put(NONFINITE, torch.zeros(2, dtype=torch.int32))),
    ("groups' columns", "groups", put(GROUPS, torch.zeros(2, len(GROUP_COLUMNS) - 1, dtype=torch.int64))),
    ("groups' dimensions", "groups", put(GROUPS, torch.zeros(len(GROUP_COLUMNS), dtype=torch.int64))),
    ("groups' dtype", "groups", put(GROUPS, torch.zeros(2, len(GROUP_COLUMNS)))),
    ("groups' strides", "groups", put(GROUPS, torch.zeros(len(GROUP_COLUMNS), 2, dtype=torch.int64).T)),
    ("components' dtype", "components", put(COMPONENTS, torch.zeros(0))),
    ("scales' dtype", "scales", put(SCALES, torch.ones(2))),
    ("hyper's columns", "hyper", put(HYPER, torch.zeros(1, len(HYPER_COLUMNS) + 1, dtype=torch.float64))),
    ("hyper's dtype", "hyper", put(HYPER, torch.zeros(1, len(HYPER_COLUMNS)))),
    ("parameter out of range", "groups: row 1", put_column("parameter", 2, 1)),
    ("negative parameter", "groups: row 1", put_column("parameter", -1, 1)),
    ("hyper out of range", "groups: row 1", put_column("hyper", 1, 1)),
    ("rule out of range", "groups: row 1", put_column("rule", 4, 1)),
    ("manifold out of range", "groups: row 1", put_column("manifold", 6, 1)),
    ("retraction out of range", "groups: row 1", put_column("retraction", -1, 1)),
    ("view out of range", "groups: row 1", put_column("view", 4, 1)),
    ("out_dim out of range", "groups: row 1", put_column("out_dim", 2, 1)),
    ("rows that do not divide", "rows", put_column("rows", 3, 1)),
    ("channel groups that do not divide", "channel_groups", put_column("channel_groups", 3, 1)),
    ("no channel groups", "channel_groups", put_column("channel_groups", 0, 1)),
    ("count beyond the last", "groups: row 1", put_column("count", 5, 1)),
    ("first beyond the last", "groups: row 1", put_column("first", 1, 1)),
    ("negative first", "groups: row 1", put_column("first", -1, 1)),
    ("negative count", "groups: row 1", put_column("count", -1, 1)),
    ("more listed than there are", "groups: row 1", put_column("listed", 1, 1)),
    ("scale out of range", "groups: row 1", put_column("scale", 2, 1)),
    ("scales beyond the last", "groups: row 1", put_column("scale_stride", 1, 1)),
    ("kernels of a matrix", "view", put_column("view", 0, 1)),
]


@pytest.mark.parametrize(("message", "change"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_arguments_raise_before_anything_is_written(message: str, change: Callable[[list[object]], None]) -> None:
    args = arguments()
    if "channel_groups" in message:
        put_column("out_dim", 1, 1)(args)
    change(args)
    tensors = [t for x in args for t in (x if isinstance(x, list) else [x])]
    before = [t.clone() for t in tensors]
    with pytest.raises((ValueError, TypeError), match=message):
        compiled(*args)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_the_valid_call_is_valid() -> None:
    args = arguments()
    compiled(*args)
    assert args[STEPS].tolist() == [1, 1]  # type: ignore[attr-defined]


def test_negative_and_conjugate_views_are_read_as_what_they_say() -> None:
    """A gradient may be a lazy view: -x has the sign in a flag, not in memory."""
    w = place_(Sphere(), torch.randn(2, 3, 3, 3), KERNEL)
    lazy = torch.complex(torch.zeros_like(w), torch.randn_like(w)).conj().imag
    assert lazy.is_neg()
    got = run_steps(compiled, [w], [[lazy]], [group(Sphere())], [{}])
    expected = run_steps(compiled, [w], [[lazy.resolve_neg()]], [group(Sphere())], [{}])
    assert torch.equal(got.params[0], expected.params[0])


# --- One call, no allocation ------------------------------------------------------------------------------------------

#: All convolutions of ResNet-18.
RESNET_18 = [
    (64, 3, 7, 7),
    *[(64, 64, 3, 3)] * 4,
    (128, 64, 3, 3),
    (128, 64, 1, 1),
    *[(128, 128, 3, 3)] * 3,
    (256, 128, 3, 3),
    (256, 128, 1, 1),
    *[(256, 256, 3, 3)] * 3,
    (512, 256, 3, 3),
    (512, 256, 1, 1),
    *[(512, 512, 3, 3)] * 3,
]


class Calls(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_of_all_convolutions_is_one_operator_that_allocates_nothing() -> None:
    from manifold_kernels.optim import FGSGD

    weights = [torch.nn.Parameter(torch.eye(*shape[2:]).expand(shape).clone()) for shape in RESNET_18]
    kernels = [{"params": [w for w in weights if w.shape[2] > 1], "manifold": "stiefel"}]
    pointwise = [{"params": [w for w in weights if w.shape[2] == 1], "manifold": "sphere", "view": "filter"}]
    for w in pointwise[0]["params"]:
        place_(Sphere(), w, FILTER)
    optimizer = FGSGD(kernels + pointwise, lr=0.1, momentum=0.9, backend="cpu")
    for w in weights:
        w.grad = torch.full_like(w, 1e-3)
    optimizer.step()
    with Calls() as calls:
        optimizer.step()
    # torch.optim marks every step for the profiler.
    assert [name for name in calls.names if not name.startswith("profiler.")] == ["manifold_kernels.step_.default"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    operators = [event.name for event in profile.events() if "::" in event.name]
    assert operators == ["manifold_kernels::step_"]
    assert not any(event.cpu_memory_usage for event in profile.events())


# --- The tables that Python and C++ share -----------------------------------------------------------------------------


def test_codes_agree() -> None:
    from manifold_kernels import _C

    assert _C.codes() == {
        "rules": plan.RULES,
        "manifolds": {of.name: of.code for of in manifolds.MANIFOLDS},
        "retractions": manifolds.RETRACTIONS,
        "views": views.VIEWS,
        "group_columns": len(GROUP_COLUMNS),
        "hyper_columns": len(HYPER_COLUMNS),
    }


def test_every_retraction_has_its_kernel() -> None:
    """A plan's number that no kernel knows would silently take another's way: all differ from one another here."""
    w = place_(Stiefel(), torch.randn(2, 3, 3, 3, dtype=torch.float64), KERNEL)
    grad = torch.randn_like(w)
    for of in (Sphere(), Oblique(), Stiefel()):
        place_(of, w, KERNEL)
        ends = [run_steps(compiled, [w], [[grad]], [group(of, retraction=r)], [{}]).params[0] for r in of.retractions]
        for index, end in enumerate(ends):
            assert all(float((end - other).abs().max()) > 1e-6 for other in ends[:index])


def test_os_threads_are_left_alone() -> None:
    """Steps from several Python threads at once, each with tensors of its own, are the steps of one."""
    cases = [(of, option, shape, layout) for of, option, shape, layout in ENGINES[:8]]
    expected: dict[int, Tensor] = {}
    got: dict[int, Tensor] = {}

    def work(index: int, into: dict[int, Tensor]) -> None:
        of, option, shape, layout = cases[index]
        generator = torch.Generator().manual_seed(index)
        w = torch.randn(shape, generator=generator, dtype=torch.float64)
        on_manifold(BY_NAME[of](), w, layout, torch.ones(views.shape_of(w, layout).count))
        grads = [[torch.randn(shape, generator=generator, dtype=torch.float64)] for _ in range(10)]
        into[index] = run_steps(compiled, [w], grads, [row(of, option, layout)], [{"momentum": 0.9}]).params[0]

    for index in range(len(cases)):
        work(index, expected)
    threads = [threading.Thread(target=work, args=(index, got)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[index], expected[index]) for index in expected)
