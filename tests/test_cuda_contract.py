"""The contract of a step, as ``test_cpu_degenerate``, ``_arguments`` and ``_threads`` have it, kept by the CUDA kernels
under the emulator; and what only they have: scaled gradients, launches whose number does not depend on the number of
tensors, blocks in any order."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import cuda_emulated
import pytest
import test_cpu_arguments as arguments
import test_cpu_degenerate as degenerate
import test_cpu_threads as threads
import torch
from cpu_lockstep import DTYPES, FG, assert_same_bits, call, clone, name_of, one_group
from cuda_emulated import launched, set_schedule, step_
from stepping import Run, group, hyper_table, place_, start
from test_cpu_arguments import (  # noqa: F401  the tests themselves
    test_buffers_are_not_read_before_the_first_step_nor_used_without_momentum,
    test_every_retraction_has_its_kernel,
    test_negative_and_conjugate_views_are_read_as_what_they_say,
    test_nothing_to_do,
    test_the_valid_call_is_valid,
    test_wrong_arguments_raise_before_anything_is_written,
)
from test_cpu_degenerate import (  # noqa: F401  the tests themselves
    test_huge_gradients,
    test_momentum_that_float16_cannot_hold,
    test_neighbours_of_a_huge_gradient_keep_their_bits,
    test_neighbours_of_a_non_finite_gradient_keep_their_bits,
    test_psi_keeps_what_cannot_be_stored,
    test_steps_that_lose_the_weight,
    test_zero_and_denormal_gradients,
    test_zero_weights,
)
from test_cpu_threads import test_os_threads_are_left_alone  # noqa: F401
from torch import Tensor

from manifold_kernels.manifolds import Euclidean, Sphere, Stiefel
from manifold_kernels.plan import Plan
from manifold_kernels.views import Layout

if (reason := cuda_emulated.missing()) is not None:
    pytest.skip(f"the CUDA kernels cannot be compiled for the CPU: {reason}", allow_module_level=True)

KERNEL, FILTER, MATRIX, FLAT = Layout("kernel"), Layout("filter"), Layout("matrix"), Layout("flat")

#: A way through each kernel.
ENGINES = [
    ("euclidean", "add", (40, 30, 3, 3), FLAT),
    ("sphere", "projection", (20, 30, 3, 3), KERNEL),
    ("stiefel", "qr", (20, 30, 3, 3), KERNEL),
    ("stiefel", "polar", (5, 4, 3, 3), KERNEL),
    ("stiefel", "qr", (5, 4, 12, 11), KERNEL),
    ("stiefel", "exp", (2, 3, 40, 7), KERNEL),
    ("stiefel", "qr", (2, 2, 130, 6), KERNEL),
    ("sphere", "exp", (50, 20), FILTER),
    ("sphere", "projection", (6, 1500), FILTER),
    ("oblique", "exp", (3, 3, 40, 10), KERNEL),
    ("oblique", "projection", (300, 70), MATRIX),
    ("scale_invariant", "psi_sgd", (6, 300), FILTER),
    ("grassmann", "sgd_g", (6, 20), FILTER),
    ("grassmann", "adam_g", (6, 300), FILTER),
]


@pytest.fixture(autouse=True)
def _by_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    for tests in (arguments, degenerate, threads):
        monkeypatch.setattr(tests, "compiled", step_)
    set_schedule(0)


def case_of(engine: tuple[str, str, tuple[int, ...], Layout], dtype: torch.dtype = torch.float32, **rest: object):
    """The weight, the rows of its plan and its hyper-parameters."""
    of, option, shape, layout = engine
    hyper = {"lr": 0.2, "momentum": 0.9}
    fg = (of, option) in FG
    case = one_group(of, option, shape, layout, dtype=dtype, step_size="general" if fg else "none", hyper=hyper)
    return case.weight, case.groups, [hyper]


def step(run: Run, grads: list[Tensor | None], rows, hyper, norms=None, grad_scale=None, found_inf=None) -> None:
    plan = Plan.build(rows, run.params)
    state = (run.params, grads, run.momenta, run.variances, run.steps, run.nonfinite)
    step_(*state, plan.groups, plan.components, plan.scales, hyper_table(hyper), norms, grad_scale, found_inf)


def small(grad: Tensor, of: str) -> Tensor:
    return grad * (0.01 if of == "scale_invariant" else 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_blocks_and_threads_in_any_order_give_the_same_bits(
    engine: tuple[str, str, tuple[int, ...], Layout], dtype: torch.dtype
) -> None:
    weight, rows, hyper = case_of(engine, dtype)
    grads = [small(torch.randn_like(weight), engine[0]) for _ in range(2)]
    runs = []
    for seed in (0, 1, 2, 3):
        set_schedule(seed)
        runs.append(start([weight], rows, hyper, fill=math.nan))
        for grad in grads:
            step(runs[-1], [grad], rows, hyper)
    for run in runs[1:]:
        assert_same_bits(run, runs[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_a_scaled_gradient_is_the_gradient(
    engine: tuple[str, str, tuple[int, ...], Layout], dtype: torch.dtype
) -> None:
    """A scale that is a power of two leaves no rounding behind, as long as the scaled gradient is a number."""
    weight, rows, hyper = case_of(engine, dtype)
    grads = [small(torch.randn_like(weight), engine[0]) for _ in range(2)]
    plain, scaled = (start([weight], rows, hyper) for _ in range(2))
    for grad in grads:
        step(plain, [grad], rows, hyper)
        step(scaled, [grad * 64], rows, hyper, grad_scale=torch.tensor([64.0]), found_inf=torch.zeros(()))
    assert_same_bits(plain, scaled)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_an_overflow_leaves_everything_as_it_was(engine: tuple[str, str, tuple[int, ...], Layout]) -> None:
    weight, rows, hyper = case_of(engine)
    for first_step in (True, False):
        run = start([weight], rows, hyper, fill=math.nan)
        if not first_step:
            step(run, [small(torch.randn_like(weight), engine[0])], rows, hyper)
        before = clone(run)
        grad = torch.randn_like(weight)
        grad.view(-1)[3] = math.inf
        step(run, [grad], rows, hyper, grad_scale=torch.tensor(1024.0), found_inf=torch.ones(1))
        assert_same_bits(run, before)


def test_launches_do_not_grow_with_the_number_of_tensors() -> None:
    """At most two for each kernel that is needed, and one that counts the step."""
    counts = []
    for copies in (1, 20):
        weights, rows = [], []
        for _ in range(copies):
            for shape, of in (((16, 16, 3, 3), Stiefel()), ((64, 40, 3, 3), Stiefel()), ((33,), Euclidean())):
                layout = FLAT if isinstance(of, Euclidean) else KERNEL
                weight = torch.randn(shape)
                weights.append(weight if layout is FLAT else place_(of, weight, layout))
                step_size = "none" if layout is FLAT else "general"
                rows.append(group(of, layout, parameter=len(weights) - 1, step_size=step_size))
        run = start(weights, rows, [{}])
        launched()
        step(run, [torch.randn_like(w) for w in weights], rows, [{}])
        counts.append(len(launched()))
    assert counts == [4, 4]  # norms and steps of 3 x 3 matrices, steps of elements, the count


#: But for the matrices that torch's linear algebra steps.
KERNELS = [engine for engine in ENGINES if engine[2] != (2, 2, 130, 6)]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("engine", KERNELS, ids=str)
def test_two_launches_at_most_for_each_kernel(
    engine: tuple[str, str, tuple[int, ...], Layout], dtype: torch.dtype
) -> None:
    """And one that counts the step, for one tensor and for three."""
    weight, rows, hyper = case_of(engine, dtype)
    counts = []
    for copies in (1, 3):
        run = start([weight] * copies, [replace(row, parameter=i) for i in range(copies) for row in rows], hyper)
        launched()
        grads = [small(torch.randn_like(weight), engine[0]) for _ in range(copies)]
        step(run, grads, [replace(row, parameter=i) for i in range(copies) for row in rows], hyper)
        counts.append(len(launched()))
    assert counts[0] == counts[1] <= 3


@pytest.mark.parametrize("engine", KERNELS, ids=str)
def test_a_planned_step_asks_torch_for_nothing(engine: tuple[str, str, tuple[int, ...], Layout]) -> None:
    """No allocation and no look at a number, with numbers in tensors, a scale and a flag; where gradients lie elsewhere
    than the last time a table is sent again: memory here, memory there, a copy."""
    weight, rows, hyper = case_of(engine)
    run, plan, table = start([weight], rows, hyper), Plan.build(rows, [weight]), hyper_table(hyper)
    live, scale, inf = table.clone(), torch.ones(1), torch.zeros(1)
    state = (run.params, run.momenta, run.variances, run.steps, run.nonfinite)

    def asked(grad: Tensor) -> Counter[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step_(
                state[0], [grad], *state[1:], plan.groups, plan.components, plan.scales, table, None, scale, inf, live
            )
        return Counter(event.name for event in profile.events() if event.name.startswith("aten::"))

    grad = small(torch.randn_like(weight), engine[0])
    assert asked(grad)  # it is planned
    assert not asked(grad)
    other = grad.clone()
    assert asked(other) == Counter({"aten::empty": 2, "aten::copy_": 1})
    assert not asked(other)


@pytest.mark.parametrize("of", ["euclidean", "sphere", "stiefel", "oblique"])
def test_one_layer_fills_the_machine(of: str) -> None:
    """132 multiprocessors of an H100; nothing runs here but a layer whose gradient overflowed."""
    weight = torch.empty(512, 512, 3, 3)
    layout = FLAT if of == "euclidean" else KERNEL
    rows = [group(of, layout, step_size="general")]
    counters = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    run = Run([weight], [weight.new_empty(0)], [torch.empty(0)], *counters)
    launched()
    step(run, [weight], rows, [{}], found_inf=torch.ones(1))
    blocks = launched()
    assert len(blocks) == 3 and min(blocks[:2]) >= 132
    # Every block of the second launch adds up what the first has left.
    assert blocks[0] <= 1024


def test_a_schedule_follows_memory_and_scales() -> None:
    """Gradients that lie otherwise, a parameter without one, scales written to: the steps are the reference's."""
    from manifold_kernels import reference

    weight = place_(Sphere(), torch.randn(4, 8, 3, 3), KERNEL)
    rows = [group(Sphere()), group(Stiefel(), parameter=1)]
    weights = [weight, place_(Stiefel(), torch.randn(3, 2, 3, 3), KERNEL)]
    run, other = start(weights, rows, [{}]), start(weights, rows, [{}])
    plan, table = Plan.build(rows, weights), hyper_table([{}])
    grad = torch.randn(4, 8, 3, 3)
    for number, given in enumerate([grad, grad.clone(), grad.to(memory_format=torch.channels_last), None]):
        if number == 2:
            plan.scales.fill_(2.0)
        grads = [given, torch.randn(3, 2, 3, 3)]
        call(step_, run, grads, plan, table)
        call(reference.step_, other, grads, plan, table)
        for got, want in zip(run.params, other.params, strict=True):
            # A few steps of a few dozen roundings each.
            assert torch.allclose(got, want, rtol=0, atol=200 * torch.finfo(torch.float32).eps)
        assert torch.equal(run.steps, other.steps)


#: Around the matrices and vectors of a warp and of blocks of 64, 128 and 256 threads.
TAILS = [n for full in (1, 8, 32, 64, 128, 256) for n in (full - 1, full, full + 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(
    ("of", "option", "shape"),
    [
        ("stiefel", "qr", (3, 3)),
        ("stiefel", "qr", (7, 7)),
        ("stiefel", "polar", (3, 3)),
        ("sphere", "projection", (4, 4)),
        ("oblique", "exp", (3, 3)),
        ("oblique", "projection", (6, 5)),
        ("scale_invariant", "psi_sgd", (1, 20)),
        ("grassmann", "adam_g", (1, 50)),
        ("euclidean", "add", (1, 1)),
    ],
    ids=str,
)
def test_tails(of: str, option: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Whatever their number, components with norms of their own get the bits that they get among others."""
    layout = KERNEL if shape[0] > 1 else FLAT if of == "euclidean" else FILTER
    hyper = {"lr": 0.2, "momentum": 0.9}
    rest = {"individual": True, "step_size": "general"} if layout is KERNEL else {}
    case = one_group(of, option, (max(TAILS), 1, *shape), layout, dtype=dtype, hyper=hyper, **rest)
    grad = small(torch.randn_like(case.weight), of)
    every = start([case.weight], case.groups, [hyper])
    step(every, [grad], case.groups, [hyper])
    for count in TAILS:
        run = start([case.weight[:count]], case.groups, [hyper])
        step(run, [grad[:count]], case.groups, [hyper])
        assert torch.equal(run.params[0], every.params[0][:count])
        assert torch.equal(run.momenta[0], every.momenta[0][:count])
