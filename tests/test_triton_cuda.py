"""Two GPU backends that share no line, Triton's interpreted and CUDA's emulated, step from the same numbers."""

from __future__ import annotations

import itertools
import math

import cuda_emulated
import pytest
import torch
from cpu_lockstep import DTYPES, MOMENTA, Case, call, clone, compare, norm_counts, one_group
from stepping import Run, hyper_table, start
from test_cuda_contract import ENGINES
from torch import Tensor
from triton_interpreted import step_

from manifold_kernels import reference
from manifold_kernels.manifolds import BY_NAME
from manifold_kernels.plan import Plan
from manifold_kernels.views import Layout

if (reason := cuda_emulated.missing()) is not None:
    pytest.skip(f"the CUDA kernels cannot be compiled for the CPU: {reason}", allow_module_level=True)


def apart(case: Case, steps: int = 2) -> tuple[float, float]:
    """How far Triton's steps are from CUDA's and from float64, in units of the bound of one of them to float64."""
    torch.set_num_threads(1)
    run = start([case.weight], case.groups, [case.hyper], fill=math.nan)
    run.params[0] = case.weight
    plan, table = Plan.build(case.groups, run.params), hyper_table([case.hyper])
    generator = torch.Generator().manual_seed(case.seed + 1)
    worst = [0.0, 0.0]
    for _ in range(steps):
        grad = case.gradient(generator)
        before = clone(run)
        others: list[tuple[Run, Tensor]] = []
        norms = torch.zeros(sum(norm_counts(plan)), dtype=torch.float64)
        for other in (cuda_emulated.step_, reference.step_):
            others.append((clone(run), torch.zeros_like(norms)))
            call(other, others[-1][0], [grad], plan, table, others[-1][1])
        call(step_, run, [grad], plan, table, norms)
        for index, (other, other_norms) in enumerate(others):
            assert torch.equal(run.steps, other.steps) and torch.equal(run.nonfinite, other.nonfinite)
            error = compare(case, 0, plan, before, grad, run, other, norms, other_norms)
            worst[index] = max(worst[index], error)
    return worst[0], worst[1]


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_triton_and_cuda_agree(engine: tuple[str, str, tuple[int, ...], Layout]) -> None:
    """A way through each kernel, in float32 and another type, with a norm for all components and for each."""
    of, option, shape, layout = engine
    index = ENGINES.index(engine)
    options = itertools.cycle(o for o in MOMENTA if of != "grassmann" or "nesterov" not in o)
    fg = of in ("sphere", "oblique", "stiefel")
    for turn, dtype in enumerate((torch.float32, DTYPES[1 + index % 3])):
        hyper = {"lr": 0.3, **next(itertools.islice(options, index, None))}
        if option == "adam_g":
            hyper["momentum"] = 0.9
        case = one_group(
            of,
            option,
            shape,
            layout,
            dtype=dtype,
            scale="each" if fg else 1.0,
            arrangement=("channels_last", "contiguous")[(index + turn) % 2] if len(shape) == 4 else "contiguous",
            individual=fg and turn == 1,
            step_size="general" if fg and turn == 0 else "none",
            hyper=hyper,
            grad_size=0.3 / (math.prod(shape[1:]) if of == "scale_invariant" else 1),
        )
        from_cuda, from_float64 = apart(case)
        # Both are within a bound of float64.
        assert from_cuda <= 2 and from_float64 <= 1, (from_cuda, from_float64)


def test_every_manifold_is_held_against_cuda() -> None:
    assert {engine[0] for engine in ENGINES} == set(BY_NAME)
