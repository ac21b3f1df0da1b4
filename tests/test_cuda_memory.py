"""Memory of other GPUs and of tensors beyond 2^31 elements, as the CUDA kernels use it under the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cuda_emulated
import pytest
import torch
from cpu_lockstep import check, one_group
from cuda_emulated import in_place_of_the_cpu, set_schedule, set_shared_memory, step_
from stepping import Run
from test_cuda_contract import KERNELS, case_of, small, step
from test_functional_qr import LIMIT, worst_polar, worst_qr
from torch import Tensor

from manifold_kernels import functional as F
from manifold_kernels.manifolds import BY_NAME
from manifold_kernels.views import Layout

if (reason := cuda_emulated.missing()) is not None:
    pytest.skip(f"the CUDA kernels cannot be compiled for the CPU: {reason}", allow_module_level=True)

KERNEL = Layout("kernel")
#: Shared memory of a block in KB: RTX 2080 (Turing), RTX 3090 and 4090, A100, H100.
DEVICES = [64, 99, 163, 227]


@pytest.fixture(autouse=True)
def _an_h100_at_last() -> Iterator[None]:
    torch.set_num_threads(1)
    set_schedule(0)
    yield
    set_shared_memory(227)


@pytest.mark.parametrize("kilobytes", DEVICES)
def test_blocks_take_no_more_shared_memory_than_there_is(kilobytes: int) -> None:
    """The emulator ends the program where they would. 64 x 64 in float32 take the very 48 KB that nobody has to ask
    for, before the kernel's own arrays; what does not fit goes to other kernels, and at last to torch."""
    set_shared_memory(kilobytes)
    for of, shape, dtype in [
        ("stiefel", (40, 9, 5, 5), torch.float64),
        ("sphere", (40, 9, 5, 5), torch.float64),
        ("oblique", (40, 9, 5, 5), torch.float64),
        ("stiefel", (2, 9, 8, 8), torch.float32),
        ("stiefel", (2, 2, 64, 64), torch.float32),
        ("stiefel", (1, 2, 90, 90), torch.float64),
        ("stiefel", (1, 1, 128, 100), torch.float32),
    ]:
        options = {"lr": 0.5, "momentum": 0.9}
        case = one_group(
            of,
            BY_NAME[of].retractions[0],
            shape,
            KERNEL,
            dtype=dtype,
            hyper=options,
            grad_size=0.1,
            step_size="general",
        )
        check(case, step=step_, steps=2)


@pytest.mark.parametrize("kilobytes", DEVICES)
def test_decompositions_take_no_more_either(kilobytes: int) -> None:
    set_shared_memory(kilobytes)
    with in_place_of_the_cpu():
        for size, dtype in (((8, 8), torch.float64), ((20, 20), torch.float64), ((64, 60), torch.float32)):
            x = torch.randn(2, *size, dtype=dtype)
            assert float(worst_qr(F.qr, x).max()) < LIMIT and float(worst_polar(F.polar, x).max()) < LIMIT


def placed(memory: Tensor, numbers: Tensor, axis: int, apart: int, offset: int) -> Tensor:
    """``numbers`` in ``memory``, neighbours along ``axis`` so many elements apart, the others one after the other."""
    strides = list(torch.empty(numbers.select(axis, 0).shape).stride())
    strides.insert(axis, apart)
    return memory.as_strided(numbers.shape, strides, offset).copy_(numbers)


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("engine", KERNELS, ids=str)
def test_elements_beyond_two_to_the_31(
    engine: tuple[str, str, tuple[int, ...], Layout], axis: int, tmp_path: Path
) -> None:
    """Components, or elements of one component, more than 2^31 apart in memory, a file with holes: weight, momentum and
    gradient are those of neighbours."""
    shape = list(engine[2])
    shape[axis] = min(shape[axis], 3)
    case_weight, rows, hyper = case_of((*engine[:2], tuple(shape), engine[3]))
    axis %= len(shape)
    grads = [small(torch.randn(shape), engine[0]) for _ in range(2)]
    found = []
    for name, apart in (("near", 2**16 + 13), ("far", 2**31 + 13)):
        # Weight, momentum and gradient lie side by side, in the room between neighbours.
        assert case_weight.numel() < 2**14
        memory = torch.from_file(str(tmp_path / name), shared=True, size=3 * apart, dtype=torch.float32)
        weight, momentum, grad = (placed(memory, case_weight, axis, apart, i << 14) for i in range(3))
        variances = torch.zeros(shape[0] if engine[1] == "adam_g" else 0)
        counts = torch.zeros(2, 1, dtype=torch.int64)
        run = Run([weight], [momentum], [variances], *counts)
        for numbers in grads:
            step(run, [grad.copy_(numbers)], rows, hyper)
        found.append((weight.clone(), momentum.clone()))
    for near, far in zip(*found, strict=True):
        if axis == 0:
            assert torch.equal(near, far)
        # Another kernel may take matrices that reach so far: two steps of a few dozen roundings.
        torch.testing.assert_close(near, far, rtol=0, atol=200 * torch.finfo(torch.float32).eps)
