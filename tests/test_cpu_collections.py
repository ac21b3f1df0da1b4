"""Weights dealt to several groups and manifolds, which the kernels sweep in their own order, beside the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from cpu_lockstep import MOMENTA, Case, assert_same_bits, call, check, clone, compiled, on_manifold
from stepping import group, hyper_table, start
from torch import Tensor

from manifold_kernels import ops, views
from manifold_kernels.manifolds import BY_NAME
from manifold_kernels.plan import Group, Plan
from manifold_kernels.views import Layout

if (missing := ops.extension_error()) is not None:
    pytest.skip(f"the compiled kernels are not there: {missing}", allow_module_level=True)

KERNEL = Layout("kernel")
SCALES = {"euclidean": 1.0, "sphere": 0.7, "oblique": 1.3, "stiefel": 0.9}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def dealt(
    shape: tuple[int, int],
    groups: int,
    *,
    manifolds: tuple[str, ...] = tuple(SCALES),
    step_size: str = "general",
    single: int = 0,
    hyper: dict[str, float] | None = None,
    grad_size: float = 0.3,
) -> Case:
    """3x3 kernels dealt at random to groups on the manifolds in turn, the first `single` of them to groups of one."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn((*shape, 3, 3), generator=generator, dtype=torch.float64)
    batch = views.matrices(weight, KERNEL).clone()
    order = torch.randperm(len(batch), generator=generator)
    parts = [*order[single:].tensor_split(groups), *([order[:single]] if single else [])]
    rows: list[Group] = []
    for index, part in enumerate(parts):
        of = manifolds[index % len(manifolds)]
        members = part.sort().values
        own = on_manifold(BY_NAME[of](), batch[members][:, None].clone(), KERNEL, torch.full((len(part),), SCALES[of]))
        batch[members] = own[:, 0]
        alone = bool(single) and index == groups
        rows.append(group(of, "kernel", components=members, scale=SCALES[of], individual=alone, step_size=step_size))
    views.write_matrices(weight, KERNEL, batch)
    return Case(weight.float(), rows, {"lr": 0.2, "momentum": 0.9, **(hyper or {})}, grad_size=grad_size)


@pytest.mark.parametrize("shape", [(7, 9), (8, 16), (5, 41)], ids=str)
@pytest.mark.parametrize("options", [*MOMENTA, {"weight_decay": 0.1}, {"momentum": 0.9, "weight_decay": 0.1}], ids=str)
def test_steps(shape: tuple[int, int], options: dict[str, float]) -> None:
    """Whole blocks and parts of one, with every kind of momentum, from the first step on; R where it is asked for."""
    check(dealt(shape, 9, hyper={"momentum": 0.0, **options}))
    check(dealt(shape, 9, single=4, hyper={"momentum": 0.0, **options}))
    check(dealt(shape, 9, step_size="none", hyper={"momentum": 0.0, **options}))


@pytest.mark.parametrize(
    "manifolds", [("sphere", "euclidean"), ("oblique",), ("stiefel", "sphere"), ("stiefel",)], ids=str
)
def test_few_manifolds(manifolds: tuple[str, ...]) -> None:
    check(dealt((9, 9), 6, manifolds=manifolds))


@pytest.mark.parametrize("grad_size", [10.0, 1e17])
def test_long_steps(grad_size: float) -> None:
    """Turns by more than a right angle, and gradients whose squares leave float32's range."""
    check(dealt((8, 16), 9, step_size="none" if grad_size < 1e6 else "general", grad_size=grad_size))


def test_a_column_of_zeros_stays() -> None:
    """An oblique column that is zero, with no gradient: there is no direction to normalise."""
    case = dealt((8, 16), 4, manifolds=("oblique", "sphere"), step_size="none")
    kernel = int(case.groups[0].components[0])
    weight = views.matrices(case.weight, KERNEL).clone()
    weight[kernel, :, 1] = 0
    views.write_matrices(case.weight, KERNEL, weight)
    grad = torch.randn(case.weight.shape, generator=torch.Generator().manual_seed(1))
    drawn = views.matrices(grad, KERNEL).clone()
    drawn[kernel, :, 1] = 0
    views.write_matrices(grad, KERNEL, drawn)
    run = start([case.weight], case.groups, [case.hyper])
    call(compiled, run, [grad], Plan.build(case.groups, run.params), hyper_table([case.hyper]))
    after = views.matrices(run.params[0], KERNEL)[kernel]
    assert bool((after[:, 1] == 0).all())
    torch.testing.assert_close(after[:, [0, 2]].norm(dim=0), torch.full((2,), 1.3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(8, 16), (7, 9)], ids=str)
def test_neighbours_of_what_is_not_finite_keep_their_bits(shape: tuple[int, int], bad: float) -> None:
    """One kernel of each manifold stays as it is and is counted; a Euclidean one without a bound is written, as in
    torch."""
    case = dealt(shape, 4, step_size="none")
    plan, table = Plan.build(case.groups, [case.weight]), hyper_table([case.hyper])
    clean = start([case.weight], case.groups, [case.hyper])
    grads = [torch.randn(case.weight.shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    call(compiled, clean, [grads[0]], plan, table)
    before, run = clone(clean), clone(clean)
    call(compiled, clean, [grads[1]], plan, table)
    hit = [int(row.components[1]) for row in case.groups]
    spoilt = views.matrices(grads[1], KERNEL).clone()
    spoilt[hit, 1, 2] = bad
    views.write_matrices(grads[1], KERNEL, spoilt)
    call(compiled, run, [grads[1]], plan, table)

    def kernels(tensor: Tensor) -> Tensor:
        return views.matrices(tensor, KERNEL)

    others = torch.ones(len(spoilt), dtype=torch.bool)
    others[hit] = False
    euclidean, rest = hit[0], hit[1:]
    for name in ("params", "momenta"):
        now, wanted, old = (kernels(getattr(state, name)[0]) for state in (run, clean, before))
        assert torch.equal(now[others], wanted[others])
        assert torch.equal(now[rest], old[rest])
        assert not bool(now[euclidean].isfinite().all())
    assert run.nonfinite.tolist() == [3]


def test_groups_leave_out_of_their_norm_what_is_not_finite() -> None:
    """R, and so the step of the others, is that of a zero gradient in its place."""
    case = dealt((8, 16), 4)
    grad = torch.randn(case.weight.shape, generator=torch.Generator().manual_seed(0))
    bad = [int(row.components[0]) for row in case.groups]
    plan, table = Plan.build(case.groups, [case.weight]), hyper_table([case.hyper])
    weights, norms = [], []
    for value in (math.nan, 0.0):
        drawn = views.matrices(grad, KERNEL).clone()
        drawn[bad] = value
        views.write_matrices(grad, KERNEL, drawn)
        run = start([case.weight], case.groups, [case.hyper])
        norms.append(torch.zeros(4, dtype=torch.float64))
        call(compiled, run, [grad], plan, table, norms[-1])
        assert run.nonfinite.tolist() == [4 if math.isnan(value) else 0]
        weights.append(views.matrices(run.params[0], KERNEL))
    assert torch.equal(*norms)
    others = torch.ones(128, dtype=torch.bool)
    others[bad] = False
    assert torch.equal(weights[0][others], weights[1][others])
    assert torch.equal(weights[0][bad], views.matrices(case.weight, KERNEL)[bad])


def test_the_same_bits_for_any_number_of_threads() -> None:
    case = dealt((120, 200), 60)
    plan, table = Plan.build(case.groups, [case.weight]), hyper_table([case.hyper])
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        run = start([case.weight], case.groups, [case.hyper])
        for i in range(2):
            call(compiled, run, [case.gradient(torch.Generator().manual_seed(i))], plan, table)
        runs.append(run)
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])


def test_kernels_listed_out_of_order_are_stepped_alike() -> None:
    """Lists that ascend are swept, others fetched one by one: two ways to the same numbers, but for roundings."""
    case = dealt((8, 16), 8)
    turned = [Group(**{**vars(row), "components": row.components.flip(0)}) for row in case.groups]
    runs = []
    for groups in (case.groups, turned):
        run = start([case.weight], groups, [case.hyper])
        grad = case.gradient(torch.Generator().manual_seed(3))
        call(compiled, run, [grad], Plan.build(groups, run.params), hyper_table([case.hyper]))
        runs.append(run.params[0])
    assert not torch.equal(*runs)  # or both went the same way
    torch.testing.assert_close(*runs, rtol=0, atol=1e-6)  # numbers below 1, some eight roundings each
    check(Case(case.weight, turned, case.hyper, grad_size=0.3))


def test_a_plan_that_was_written_to_is_read_again() -> None:
    case = dealt((8, 16), 4)
    plan, table = Plan.build(case.groups, [case.weight]), hyper_table([case.hyper])
    run = start([case.weight], case.groups, [case.hyper])
    grad = case.gradient(torch.Generator().manual_seed(3))
    call(compiled, clone(run), [grad], plan, table)
    swapped = plan.components.view(4, 32)[[1, 0, 2, 3]].flatten()
    plan.components.copy_(swapped)
    fresh = Plan(plan.groups.clone(), swapped.clone(), plan.scales.clone())
    again, wanted = clone(run), clone(run)
    call(compiled, again, [grad], plan, table)
    call(compiled, wanted, [grad], fresh, table)
    assert_same_bits(again, wanted)
