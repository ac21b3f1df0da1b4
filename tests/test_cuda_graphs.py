"""CUDA graphs, played by the emulator: launches of a capture are kept, and run later with what memory holds by then."""

from __future__ import annotations

import cuda_emulated
import pytest
import torch
from cpu_lockstep import assert_same_bits, clone
from cuda_emulated import capturing, in_place_of_the_cpu, set_schedule, step_
from stepping import Run, hyper_table, start
from test_cuda_contract import ENGINES, KERNELS, case_of, small
from torch import Tensor

from manifold_kernels import functional as F
from manifold_kernels.plan import HYPER_COLUMNS, Plan
from manifold_kernels.views import Layout

if (reason := cuda_emulated.missing()) is not None:
    pytest.skip(f"the CUDA kernels cannot be compiled for the CPU: {reason}", allow_module_level=True)

Engine = tuple[str, str, tuple[int, ...], Layout]
#: Of the optimizers that take turns, more than the backend keeps plans of.
OTHERS = 20


@pytest.fixture(autouse=True)
def _one_after_the_other() -> None:
    torch.set_num_threads(1)
    set_schedule(0)


def take(run: Run, grad: Tensor, plan: Plan, live: Tensor) -> None:
    """A step with the learning rate of ``live``; the operator's own table has another, which must not be read."""
    table = live.clone()
    table[:, HYPER_COLUMNS.index("lr")] = 100.0
    state = (run.params, [grad], run.momenta, run.variances, run.steps, run.nonfinite)
    step_(*state, plan.groups, plan.components, plan.scales, table, None, None, None, live)


@pytest.mark.parametrize("engine", KERNELS, ids=str)
def test_a_replayed_step_is_the_step(engine: Engine) -> None:
    """With the gradient and the learning rate of that moment, whatever was stepped since the capture."""
    weight, rows, hyper = case_of(engine)
    grad = small(torch.randn_like(weight), engine[0])
    live, plan = hyper_table(hyper), Plan.build(rows, [weight])
    captured, plain = start([weight], rows, hyper), start([weight], rows, hyper)
    for run in (captured, plain):
        take(run, grad, plan, live)
    with capturing() as replay:
        take(captured, grad, plan, live)
    assert_same_bits(captured, plain)
    # Their schedules take the place of the captured one, and the memory of its tables, if it lets go.
    for _ in range(OTHERS):
        other = start([weight], rows, hyper)
        take(other, grad, Plan.build(rows, [weight]), live)
    for number in range(3):
        between = small(torch.randn_like(weight), engine[0])
        grad.copy_(small(torch.randn_like(weight), engine[0]))
        live[:, HYPER_COLUMNS.index("lr")] = 0.3 / (1 + number)
        take(captured, between, plan, live)
        replay()
        for one in (between, grad.clone()):
            take(plain, one, plan, live)
        assert_same_bits(captured, plain)


def test_what_goes_to_torch_is_refused() -> None:
    (engine,) = set(ENGINES) - set(KERNELS)
    weight, rows, hyper = case_of(engine)
    live, plan, run = hyper_table(hyper), Plan.build(rows, [weight]), start([weight], rows, hyper)
    take(run, torch.randn_like(weight), plan, live)
    before = clone(run)
    with capturing(), pytest.raises(RuntimeError, match=r"params\[0\].* torch's linear algebra, which no CUDA graph"):
        take(run, torch.randn_like(weight), plan, live)
    assert_same_bits(run, before)


def test_replayed_decompositions() -> None:
    """Of matrices that no operator of torch's turns, which the emulator's graph does not hold."""
    for size in ((3, 3), (7, 4), (20, 11), (40, 7)):
        x, other = torch.randn(5, *size), torch.randn(5, *size)
        with in_place_of_the_cpu():
            with capturing() as replay:
                found = [*F.qr(x), F.qf(x), F.polar(x)]
            x.copy_(other)
            replay()
            wanted = [*F.qr(other), F.qf(other), F.polar(other)]
        for got, want in zip(found, wanted, strict=True):
            assert torch.equal(got, want)
