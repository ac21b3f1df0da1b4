"""Input that no training should have: NaN and Inf, huge, zero, denormal and lost numbers, through every kernel."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_engines import ENGINES, FILTER, KERNEL, MATRIX, landing, read, row, violation, weight_of
from cpu_lockstep import DTYPES, FG, arithmetic, clone, compiled, name_of
from stepping import group, like, run_steps

from manifold_kernels import ops, views
from manifold_kernels.manifolds import ScaleInvariant
from manifold_kernels.views import Layout

if (missing := ops.extension_error()) is not None:
    pytest.skip(f"the compiled kernels are not there: {missing}", allow_module_level=True)

NAMES = {"ids": name_of}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


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
