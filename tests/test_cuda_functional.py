"""QR and polar decompositions by the CUDA kernels, run on the CPU by the emulator: the tests of the CPU's, and more."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_emulated
import pytest
import test_functional_qr as suite
import torch
from cuda_emulated import in_place_of_the_cpu, launched, set_schedule
from matrix_families import families
from test_functional_qr import (  # noqa: F401  the tests themselves
    DTYPES,
    test_derivatives_are_torchs,
    test_empty_batches,
    test_errors_name_the_argument,
    test_every_column_is_accurate_by_itself,
    test_families,
    test_first_and_second_derivatives,
    test_nan_and_inf_stay_in_their_matrix,
    test_opcheck,
    test_polar_is_scipys,
    test_qr_is_torchs_up_to_signs,
    test_same_bits_anywhere,
    test_transforms,
)
from torch import Tensor

from manifold_kernels import functional as F

if (reason := cuda_emulated.missing()) is not None:
    pytest.skip(f"the CUDA kernels cannot be compiled for the CPU: {reason}", allow_module_level=True)

#: Sizes by who takes a matrix: a thread in its registers or in shared memory, a warp, a block.
KERNELS = [(3, 3), (8, 8), (7, 4), (4, 7), (12, 11), (11, 20), (40, 7)]
#: Matrices of a block of threads, by the side of a square that registers hold; 32 where they lie in shared memory.
BLOCK = {3: 128, 8: 64}


@pytest.fixture(autouse=True)
def _by_the_emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.set_num_threads(1)
    monkeypatch.setattr(suite, "COPIES", 8)  # threads of the CPU have no part in it
    with in_place_of_the_cpu():
        set_schedule(0)
        yield


def batch_of(size: tuple[int, int], dtype: torch.dtype, matrices: int) -> Tensor:
    found = torch.stack(list(families(*size, dtype).values()))
    return found.repeat(-(-matrices // len(found)), 1, 1)[:matrices]


def results(x: Tensor) -> list[Tensor]:
    return [*F.qr(x), F.qf(x), F.polar(x)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", KERNELS, ids=str)
def test_tails_and_misaligned_batches(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Whatever the number of matrices and their address, each one gets the bits that it gets alone."""
    alone = [
        torch.cat(parts) for parts in zip(*(results(one) for one in batch_of(size, dtype, 21).split(1)), strict=True)
    ]
    for matrices in (0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129):
        if size[0] > 8 and matrices > 33:
            continue
        x = batch_of(size, dtype, matrices)
        memory = torch.empty(x.numel() + 1, dtype=dtype)
        shifted = memory[1:].view(x.shape).copy_(x)
        for got, shifted_got, want in zip(results(x), results(shifted), alone, strict=True):
            wanted = want[torch.arange(matrices) % len(want)]
            assert torch.equal(got, wanted) and torch.equal(shifted_got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", KERNELS, ids=str)
def test_blocks_and_threads_in_any_order_give_the_same_bits(size: tuple[int, int], dtype: torch.dtype) -> None:
    x = batch_of(size, dtype, 150 if size[0] <= 8 else 21)
    wanted = results(x)
    for seed in (1, 2, 3):
        set_schedule(seed)
        for got, want in zip(results(x), wanted, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("size", KERNELS, ids=str)
def test_one_launch_a_call(size: tuple[int, int]) -> None:
    x = torch.randn(300, *size) if size[0] <= 8 else torch.randn(5, *size)
    warps = max(size) <= 32
    for function, in_registers in ((F.qr, (3, 8)), (F.qf, (3, 8)), (F.polar, (3,))):
        launched()
        function(x)
        if x[0].numel() > 64:
            blocks = -(-len(x) // 2) if warps else len(x)
        else:
            side = size[0] if size[0] == size[1] and size[0] in in_registers else 0
            blocks = -(-len(x) // BLOCK.get(side, 32))
        assert launched() == [blocks]


def test_what_is_too_large_goes_to_torch() -> None:
    """16384 elements are a block's; of polar, too, as long as three more squares fit in its shared memory."""
    for function, size, launches in (
        (F.qr, (128, 128), 1),
        (F.qr, (129, 128), 0),
        (F.polar, (110, 100), 1),
        (F.polar, (128, 128), 0),
    ):
        x = torch.randn(1, *size, dtype=torch.float32)
        launched()
        out = function(x)
        q = out if isinstance(out, Tensor) else out[0]
        assert len(launched()) == launches
        # Orthonormal to a few roundings of each of the longest sums, of 129 products.
        error = (q.double().mT @ q.double() - torch.eye(q.shape[-1], dtype=torch.float64)).abs().amax()
        assert error < 130 * torch.finfo(torch.float32).eps
