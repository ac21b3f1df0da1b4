"""The ordinary step of small matrices where they lie, in bodies of its own: bfloat16 kernels two blocks at a time,
``channels_last`` kernels a few blocks at a time, stream by stream.

Both are for the commonest step only (momentum, one norm a kernel, Corollary 2), fall back block by block, and must give
the bits that every other way gives.
"""

from __future__ import annotations

import pytest
import torch
from cpu_lockstep import Case, arranged, check, compiled, name_of, one_group
from stepping import Run, run_steps
from torch import Tensor

from manifold_kernels import ops
from manifold_kernels.views import Layout

if (missing := ops.extension_error()) is not None:
    pytest.skip(f"the compiled kernels are not there: {missing}", allow_module_level=True)

KERNEL = Layout("kernel")
#: Types and layouts that have bodies of their own.
OWN = [(torch.bfloat16, "contiguous"), (torch.bfloat16, "channels_last"), (torch.float32, "channels_last")]
MANIFOLDS = ["sphere", "oblique", "stiefel"]
HALVES = [torch.bfloat16, torch.float16]
#: Inputs of a kernel: parts of a register, registers and tiles, one more and one less, for registers of 4, 8 and 16.
COUNTS = [15, 16, 17, 31, 33, 48, 63, 64, 80, 97, 129, 1041]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def ordinary(of: str, shape: tuple[int, ...], dtype: torch.dtype, lr: float = 0.5, **rest: object) -> Case:
    """The commonest step; from the second on, when there is a momentum, it has a body of its own."""
    retraction = "qr" if of == "stiefel" else "projection"
    hyper = {"lr": lr, "momentum": 0.9}
    return one_group(
        of, retraction, shape, KERNEL, dtype=dtype, individual=True, step_size="general", hyper=hyper, **rest
    )


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("of", MANIFOLDS)
def test_16_bit_kernels_of_any_count(of: str, dtype: torch.dtype) -> None:
    """Against the reference: one unit of the storage and the roundings of float32."""
    for count in COUNTS:
        for arrangement in ("contiguous", "misaligned"):
            check(ordinary(of, (1, count, 3, 3), dtype, arrangement=arrangement, grad_size=0.3))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=name_of)
@pytest.mark.parametrize("of", MANIFOLDS)
def test_channels_last_kernels_of_any_count(of: str, dtype: torch.dtype) -> None:
    """Tails of a row of inputs, rows of a power of two, and gradients that lie otherwise."""
    for count in COUNTS:
        for size in (3, 4, 5) if count < 64 else (3,):
            shape = (3, count, size, size) if count < 1000 else (2, count, size, size)
            check(
                ordinary(of, shape, dtype, arrangement="channels_last", grad_arrangement="channels_last", grad_size=0.3)
            )
    check(ordinary(of, (3, 64, 3, 3), dtype, arrangement="channels_last", grad_size=0.3))


def stepped(case: Case, buffer: Tensor, grad: Tensor) -> Run:
    """One step of ``case``'s weight with that momentum."""
    first = run_steps(compiled, [case.weight], [[torch.zeros_like(grad)]], case.groups, [case.hyper])
    first.params[0].copy_(case.weight)
    first.momenta[0].copy_(buffer)
    first.nonfinite.zero_()
    return run_steps(compiled, first, [[grad]], case.groups, [case.hyper])


@pytest.mark.parametrize("lr", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("of", MANIFOLDS)
def test_kernels_side_by_side_get_the_bits_that_each_gets_alone(of: str, lr: float) -> None:
    """160 kernels, and each of them in a weight of its own, which is stepped as a copy in float32. Steps are short and
    go far, gradients lie below 2, above it and beyond the range of squares, so that some take the ways around."""
    for dtype, arrangement in OWN:
        case = ordinary(of, (1, 160, 3, 3), dtype, lr, arrangement=arrangement)
        generator = torch.Generator().manual_seed(7)
        sizes = torch.tensor([1e-4, 1e-2, 1.0, 100.0] * 39 + [1e6, 1e18, 1e25, 1e30]).reshape(1, -1, 1, 1)
        buffer, grad = (
            arranged((torch.randn(1, 160, 3, 3, generator=generator) * sizes).to(dtype), arrangement) for _ in range(2)
        )
        together = stepped(case, buffer, grad)
        assert together.nonfinite.tolist() == [0]
        for k in range(160):
            one = Case(arranged(case.weight[:, k : k + 1], "contiguous"), case.groups, case.hyper)
            alone = stepped(one, buffer[:, k : k + 1], arranged(grad[:, k : k + 1], "contiguous"))
            assert torch.equal(alone.params[0], together.params[0][:, k : k + 1]), (dtype, arrangement, k)
            assert torch.equal(alone.momenta[0], together.momenta[0][:, k : k + 1]), (dtype, arrangement, k)


@pytest.mark.parametrize("where", ["gradient", "momentum", "weight"])
@pytest.mark.parametrize("of", MANIFOLDS)
def test_nothing_of_a_kernel_that_is_not_finite_is_written(of: str, where: str) -> None:
    """NaN or Inf in the first, second, … block of those that are stepped together, and in the last element of a kernel,
    which comes when the others' momentum has been stored: the kernel keeps every bit, and the others get the bits that
    they get beside a kernel of ordinary numbers."""
    generator = torch.Generator().manual_seed(3)
    for dtype, arrangement in OWN:
        case = ordinary(of, (2, 100, 3, 3), dtype, 0.3, arrangement=arrangement)
        buffer, grad = (
            arranged(torch.randn(2, 100, 3, 3, generator=generator).to(dtype), arrangement) for _ in range(2)
        )
        expected = stepped(case, buffer, grad)
        for k, value in (
            (0, torch.nan),
            (17, torch.inf),
            (35, -torch.inf),
            (52, torch.nan),
            (77, torch.nan),
            (99, torch.inf),
        ):
            weight, old, new = (arranged(t, arrangement) for t in (case.weight, buffer, grad))
            {"gradient": new, "momentum": old, "weight": weight}[where][1, k, 2, 2] = value
            run = stepped(Case(weight, case.groups, case.hyper), old, new)
            assert run.nonfinite.tolist() == [1]
            others = torch.ones(2, 100, dtype=torch.bool)
            others[1, k] = False
            for got, before, want in (
                (run.params[0], weight, expected.params[0]),
                (run.momenta[0], old, expected.momenta[0]),
            ):
                assert torch.equal(got[1, k].nan_to_num(7.0), before[1, k].nan_to_num(7.0))
                assert torch.equal(got[others], want[others])
