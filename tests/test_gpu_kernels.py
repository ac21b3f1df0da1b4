"""The CUDA kernels on a GPU against the reference: the tests of the CPU's steps, their arguments, degenerate input and
decompositions.

Tensors lie on the CPU in those tests. ``step_`` takes their storages to the GPU, whole, so that every address keeps its
alignment and every gap its content, steps there, and brings the storages back.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import test_cpu_arguments as arguments
import test_cpu_degenerate as degenerate
import test_cpu_kernels as suite
import test_functional_qr as functional_qr
import torch
from cpu_lockstep import assert_same_bits, check
from matrix_families import families
from stepping import Run, hyper_table, start
from test_cpu_arguments import (  # noqa: F401  the tests themselves
    test_buffers_are_not_read_before_the_first_step_nor_used_without_momentum,
    test_every_retraction_has_its_kernel,
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
from test_cpu_kernels import *  # noqa: F403  the tests themselves
from test_cuda_contract import KERNELS, case_of, small
from torch import Tensor, UntypedStorage

from manifold_kernels import decompositions, ops
from manifold_kernels.plan import HYPER_COLUMNS, Plan
from manifold_kernels.views import Layout

if not torch.cuda.is_available():
    pytest.skip("there is no GPU; `make test-gpu` runs these tests where there is one", allow_module_level=True)

#: Of the operator's arguments, those that stay on the CPU: groups, components, scales, hyper.
ON_CPU = range(6, 10)
DEVICE = torch.device("cuda")


def step_(*arguments: Sequence[Tensor | None] | Tensor | None) -> None:
    """The operator, on copies of the storages that lie on the GPU."""
    assert ops.backends()["cuda"] is None
    storages: dict[int, tuple[UntypedStorage, UntypedStorage]] = {}  # here and there, by address

    def moved(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        here = tensor.untyped_storage()
        _, there = storages.setdefault(here.data_ptr(), (here, here.to(device=DEVICE)))
        empty = torch.empty(0, dtype=tensor.dtype, device=DEVICE)
        return empty.set_(there, tensor.storage_offset(), tensor.shape, tensor.stride())

    given = [
        argument
        if position in ON_CPU
        else [moved(one) for one in argument]
        if isinstance(argument, (list, tuple))
        else moved(argument)
        for position, argument in enumerate(arguments)
    ]
    torch.ops.manifold_kernels.step_(*given)
    for here, there in storages.values():
        here.copy_(there)


@pytest.fixture(autouse=True)
def _on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "check", partial(check, step=step_))
    monkeypatch.setattr(suite, "compiled", step_)
    monkeypatch.setattr(arguments, "compiled", step_)
    monkeypatch.setattr(degenerate, "compiled", step_)


@pytest.mark.parametrize("dtype", functional_qr.DTYPES)
def test_decompositions(dtype: torch.dtype) -> None:
    """Sizes of every kernel, and of torch's linear algebra."""
    for n, p in [*functional_qr.SMALL, (12, 25), (32, 32), (33, 33), (64, 32), (3, 300), (128, 128), (129, 128)]:
        batch = torch.stack(list(families(n, p, dtype).values()))
        ratios = torch.maximum(
            functional_qr.worst_qr(lambda a: tuple(one.cpu() for one in decompositions.qr(a.to(DEVICE))), batch),
            functional_qr.worst_polar(lambda a: decompositions.polar(a.to(DEVICE)).cpu(), batch),
        )
        assert float(ratios.max()) < functional_qr.LIMIT, (n, p)


@pytest.mark.parametrize("engine", KERNELS, ids=str)
def test_a_replayed_step_is_the_step(engine: tuple[str, str, tuple[int, ...], Layout]) -> None:
    """From a CUDA graph, with the gradient and the learning rate of that moment."""
    weight, rows, hyper = case_of(engine)
    plan, table = Plan.build(rows, [weight]), hyper_table(hyper)
    live, grad = table.to(DEVICE), small(torch.randn_like(weight), engine[0]).to(DEVICE)

    def begun() -> Run:
        run = start([weight], rows, hyper)
        lists = ([one.to(DEVICE) for one in tensors] for tensors in (run.params, run.momenta, run.variances))
        return Run(*lists, run.steps.to(DEVICE), run.nonfinite.to(DEVICE))

    def take(run: Run) -> None:
        state = (run.params, [grad], run.momenta, run.variances, run.steps, run.nonfinite)
        plain = (plan.groups, plan.components, plan.scales, table)
        torch.ops.manifold_kernels.step_(*state, *plain, None, None, None, live)

    captured, plain = begun(), begun()
    for run in (captured, plain):
        take(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        take(captured)
    for number in range(3):
        grad.copy_(small(torch.randn_like(weight), engine[0]))
        live[:, HYPER_COLUMNS.index("lr")] = 0.3 / (1 + number)
        graph.replay()
        take(plain)
        assert_same_bits(captured, plain)
