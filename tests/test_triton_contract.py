"""The contract of a step, as ``test_cpu_degenerate`` and ``test_cpu_arguments`` have it, kept by the Triton kernels;
their choice, and optimizers."""

from __future__ import annotations

import math
import re
import runpy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import test_amp_operator as amp
import test_cpu_arguments as arguments
import test_cpu_degenerate as degenerate
import torch
from cpu_engines import row, weight_of
from cpu_lockstep import call
from stepping import group, hyper_table, place_, run_steps, start
from test_capturable import NoReading
from triton_interpreted import launch, planning, step_

from manifold_kernels import ops, validate
from manifold_kernels.manifolds import Grassmann, Sphere, Stiefel
from manifold_kernels.optim import FGSGD, PSISGD, AdamG
from manifold_kernels.plan import Plan
from manifold_kernels.triton import support
from manifold_kernels.views import Layout

KERNEL, FILTER = Layout("kernel"), Layout("filter")

#: A way through each kernel: unrolled, vectors, matrices by products, torch's linear algebra, rows.
ENGINES = [
    ("sphere", "projection", (2, 5, 3, 3), KERNEL),
    ("stiefel", "qr", (2, 5, 3, 3), KERNEL),
    ("stiefel", "exp", (2, 5, 3, 3), KERNEL),
    ("oblique", "exp", (2, 3, 40, 10), KERNEL),
    ("sphere", "exp", (6, 300), FILTER),
    ("stiefel", "qr", (2, 2, 12, 11), KERNEL),
    ("stiefel", "cayley", (2, 2, 40, 3), KERNEL),
    ("scale_invariant", "psi_sgd", (6, 30, 3, 3), FILTER),
    ("grassmann", "sgd_g", (6, 30, 3, 3), FILTER),
    ("grassmann", "adam_g", (6, 30, 3, 3), FILTER),
]
#: Without the exponential on Stiefel, which goes along a long way in steps of its own: minutes under the interpreter.
DIRECT = [engine for engine in ENGINES if engine[:2] != ("stiefel", "exp")]
FG_ENGINES = [engine for engine in DIRECT if engine[0] in ("sphere", "oblique", "stiefel")]


@pytest.fixture(autouse=True)
def _by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(arguments, "compiled", step_)
    monkeypatch.setattr(degenerate, "compiled", step_)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_neighbours_of_a_non_finite_gradient_keep_their_bits(engine: tuple[str, str, tuple[int, ...], Layout]) -> None:
    if engine[2][-2:] != (40, 3):  # a batch of torch's linear algebra takes one way for all
        degenerate.test_neighbours_of_a_non_finite_gradient_keep_their_bits(engine, False, math.nan)


@pytest.mark.parametrize("engine", DIRECT, ids=str)
def test_huge_gradients(engine: tuple[str, str, tuple[int, ...], Layout]) -> None:
    degenerate.test_huge_gradients(engine, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("engine", FG_ENGINES, ids=str)
def test_steps_that_lose_the_weight(engine: tuple[str, str, tuple[int, ...], Layout], dtype: torch.dtype) -> None:
    degenerate.test_steps_that_lose_the_weight(engine, dtype, 1e8)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_zero_and_denormal_gradients(engine: tuple[str, str, tuple[int, ...], Layout]) -> None:
    degenerate.test_zero_and_denormal_gradients(engine, torch.float32)


def test_degenerate_input() -> None:
    degenerate.test_zero_weights(torch.float32)
    degenerate.test_psi_keeps_what_cannot_be_stored()
    arguments.test_nothing_to_do()
    arguments.test_negative_and_conjugate_views_are_read_as_what_they_say()
    degenerate.test_momentum_that_float16_cannot_hold(ENGINES[1])


def test_buffers_are_not_read_before_the_first_step() -> None:
    for of, option, shape, layout in ENGINES:
        w = weight_of(of, shape, layout, torch.float32)
        grad, rows = torch.randn_like(w), [row(of, option, layout)]
        clean, spoiled = (
            run_steps(step_, [w], [[grad]], rows, [{"momentum": 0.9}], fill=fill) for fill in (0.0, math.nan)
        )
        assert torch.equal(clean.params[0], spoiled.params[0]) and torch.equal(clean.momenta[0], spoiled.momenta[0])


@pytest.mark.parametrize("engine", DIRECT, ids=str)
def test_the_host_waits_for_no_number(engine: tuple[str, str, tuple[int, ...], Layout]) -> None:
    """With a gradient scaler and learning rates in tensors, once a step is planned: of plans, which lie on the CPU,
    numbers are read."""
    w, rows, table = amp.weight_of(engine), amp.rows_of(engine), hyper_table([{"momentum": 0.9}])
    run, plan = start([w], rows, [{"momentum": 0.9}]), Plan.build(rows, [w])
    numbers = table, None, torch.tensor(2.0), torch.tensor(0.0), table.clone()
    for reading in (nullcontext(), NoReading()):
        with reading:
            step_(
                run.params, [torch.randn_like(w)], run.momenta, run.variances, run.steps, run.nonfinite,
                plan.groups, plan.components, plan.scales, *numbers,
            )  # fmt: skip
    assert run.steps.tolist() == [2] and not torch.equal(run.params[0], w)


@pytest.mark.parametrize(("lanes", "launches"), [(1024, 1), (16, 3)])
def test_launches_do_not_grow_with_the_number_of_tensors(
    lanes: int, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One where groups fit in a program; norms, their sums and steps where they do not."""
    monkeypatch.setattr(planning, "LANES", lanes)
    for number in (1, 20):
        weights = [place_(Sphere(), torch.randn(4, 8, 3, 3), KERNEL) for _ in range(number)]
        rows = [group(Sphere(), parameter=index, step_size="general") for index in range(number)]
        table, momenta = hyper_table([{"momentum": 0.9}]), [torch.zeros_like(w) for w in weights]
        plan = Plan.build(rows, weights)
        made = planning.schedule(plan, weights, weights, momenta, table, norms=False, amp=False)
        assert len(made.launches) == launches


def test_a_schedule_is_made_once_and_follows_memory() -> None:
    """The same plan and memory: the same launches. Gradients that lie otherwise, scales written to: right steps."""
    w = place_(Sphere(), torch.randn(4, 8, 3, 3), KERNEL)
    rows = [group(Sphere())]
    run, other = start([w], rows, [{}]), start([w], rows, [{}])
    plan, table = Plan.build(rows, [w]), hyper_table([{}])
    launch.forget()
    grad = torch.randn(4, 8, 3, 3)
    for number, given in enumerate([grad, grad.clone(), grad.to(memory_format=torch.channels_last)]):
        if number == 2:
            plan.scales.fill_(2.0)
        before = len(launch._SCHEDULES)
        call(step_, run, [given], plan, table)
        assert len(launch._SCHEDULES) == before + (number != 1)
        call(ops.resolve("reference", w.device), other, [given], plan, table)
        assert torch.allclose(run.params[0], other.params[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("message", "change"), [case[1:] for case in arguments.WRONG], ids=lambda case: None)
def test_wrong_arguments_raise_before_anything_is_written(message: str, change: Callable[[list[object]], None]) -> None:
    """What is wrong in a row of the plan is said as the plan says it."""
    of_the_plan = re.match("groups|components|scales|rows|channel_groups|view", message)
    message = "plan: |out_dim|rows|channel_groups|view" if of_the_plan else message
    arguments.test_wrong_arguments_raise_before_anything_is_written(message, change)


def test_optimizers_step_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizers' own way to the backend, two steps beside the reference."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for make, of, options in ((FGSGD, Stiefel(), {"lr": 0.1}), (AdamG, Grassmann(), {}), (PSISGD, None, {"lr": 0.1})):
        weights = []
        for backend in ("triton", "reference"):
            layout = KERNEL if isinstance(of, Stiefel) else FILTER
            w = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(0))
            w = torch.nn.Parameter(w if of is None else place_(of, w, layout))
            optimizer = make([{"params": [w], **({} if of is None else {"manifold": of})}], backend=backend, **options)
            for step in range(2):
                w.grad = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(step))
                optimizer.step()
            weights.append(w.detach())
        # Two steps with a few dozen roundings each.
        assert torch.allclose(*weights, rtol=0, atol=100 * torch.finfo(torch.float32).eps)


def test_what_validate_checks_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for case in {case.label: case for case in validate.cases(quick=True)}.values():
        assert validate.run(case, "triton").passed, case


def test_the_choice_of_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.delenv("MANIFOLD_KERNELS_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ops.automatic("cuda") == "triton" and ops.automatic("cpu") in ("cpu", "reference")
    assert ops.resolve("auto", gpu) is step_
    with monkeypatch.context() as compiled:
        compiled.setattr(ops, "cuda_error", lambda: None)
        assert ops.automatic("cuda") == "cuda" and ops.chosen("triton", gpu) == "triton"
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        ops.resolve("triton", cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="there is no GPU; TRITON_INTERPRET=1"):
        ops.resolve("triton", cpu)
    assert ops.automatic("cuda") == "reference"
    monkeypatch.setenv("MANIFOLD_KERNELS_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.resolve("auto", cpu) is step_


def test_versions_that_are_not_tested_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = "wanted triton >= 3.6, < 3.9, got {}"
    for version, accepted in (("3.5.1", False), ("3.6.0", True), ("3.8.9", True), ("3.9.0", False), ("3.10.0", False)):
        monkeypatch.setattr(support.metadata, "version", lambda _, version=version: version)
        assert support.missing(gpu=True) == (None if accepted else wanted.format(version))
    # The backend does not let itself be imported with them, either.
    with pytest.raises(ImportError, match=r"wanted triton >= 3.6, < 3.9, got 3\.10\.0"):
        runpy.run_path(planning.__file__)
    monkeypatch.setattr(support.metadata, "version", lambda _: "3.6.0")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu130")
    assert support.missing(gpu=True) == "wanted torch >= 2.13, got 2.9.1+cu130"
