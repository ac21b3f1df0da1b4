"""The same bits for every number of threads, threads that share a step, and steps from several of Python's."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path

import pytest
import torch
from cpu_engines import ENGINES, FILTER, KERNEL, MATRIX, row
from cpu_lockstep import FG, call, compiled, name_of, on_manifold
from stepping import Run, group, hyper_table, place_, run_steps, start
from torch import Tensor

from manifold_kernels import ops, views
from manifold_kernels.manifolds import BY_NAME
from manifold_kernels.plan import Plan
from manifold_kernels.views import Layout

if (missing := ops.extension_error()) is not None:
    pytest.skip(f"the compiled kernels are not there: {missing}", allow_module_level=True)

NAMES = {"ids": name_of}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


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
