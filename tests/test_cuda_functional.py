"""QR and polar decompositions by the CUDA kernels, run on the CPU by the emulator: the tests of the CPU's, and more."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import cuda_emulated
import pytest
import test_functional_qr as suite
import torch
from cuda_emulated import in_place_of_the_cpu, launched, set_schedule
from matrix_families import families
from test_functional_qr import (  # noqa: F401  the tests themselves
    DTYPES,
    SMALL,
    check_families,
    test_derivatives_are_torchs,
    test_empty_batches,
    test_errors_name_the_argument,
    test_every_column_is_accurate_by_itself,
    test_first_and_second_derivatives,
    test_nan_and_inf_stay_in_their_matrix,
    test_opcheck,
    test_polar_is_scipys,
    test_qr_is_torchs_up_to_signs,
    test_same_bits_anywhere,
    test_transforms,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from manifold_kernels import functional as F
from manifold_kernels import manifolds
from manifold_kernels.reference.registry import GEOMETRIES

if (reason := cuda_emulated.missing()) is not None:
    pytest.skip(f"the CUDA kernels cannot be compiled for the CPU: {reason}", allow_module_level=True)

#: Sizes by who takes a matrix: a thread in its registers or in shared memory, a warp, a block.
KERNELS = [(3, 3), (8, 8), (7, 4), (4, 7), (12, 11), (11, 20), (40, 7)]
#: Of the sizes for the CPU, some of each kernel.
SIZES = [
    *SMALL,
    (9, 9),
    (10, 5),
    (5, 11),
    (17, 17),
    (12, 25),
    (32, 32),
    (33, 33),
    (64, 32),
    (46, 45),
    (3, 300),
    (2048, 1),
]
#: Matrices of a block of threads, by the side of a square that registers hold; 32 where they lie in shared memory.
BLOCK = {3: 128, 8: 64}


@pytest.fixture(autouse=True)
def _by_the_emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.set_num_threads(1)
    monkeypatch.setattr(suite, "COPIES", 8)  # threads of the CPU have no part in it
    with in_place_of_the_cpu():
        set_schedule(0)
        yield


def batch_of(size: tuple[int, int], dtype: torch.dtype, matrices: int | None = None) -> Tensor:
    """All families, again and again, up to that number; by default each once."""
    found = torch.stack(list(families(*size, dtype).values()))
    matrices = len(found) if matrices is None else matrices
    return found.repeat(-(-matrices // len(found)), 1, 1)[:matrices]


def results(x: Tensor) -> list[Tensor]:
    return [*F.qr(x), F.qf(x), F.polar(x)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_families(dtype: torch.dtype) -> None:
    for n, p in SIZES:
        check_families(n, p, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", KERNELS, ids=str)
def test_tails_and_misaligned_batches(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Whatever the number of matrices and their address, each one gets the bits that it gets alone."""
    every = batch_of(size, dtype)
    alone = [torch.cat(parts) for parts in zip(*(results(one) for one in every.split(1)), strict=True)]
    for matrices in (0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129):
        if size[0] > 8 and matrices > 33:
            continue
        x = batch_of(size, dtype, matrices)
        memory = torch.empty(x.numel() + 1, dtype=dtype)
        shifted = memory[1:].view(x.shape).copy_(x)
        for got, shifted_got, want in zip(results(x), results(shifted), alone, strict=True):
            wanted = want[torch.arange(matrices) % len(every)]
            assert torch.equal(got, wanted) and torch.equal(shifted_got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", KERNELS, ids=str)
def test_blocks_and_threads_in_any_order_give_the_same_bits(size: tuple[int, int], dtype: torch.dtype) -> None:
    x = batch_of(size, dtype, 150 if size[0] <= 8 else None)
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


class NoWaiting(TorchDispatchMode):
    """Raises for what makes the host wait for a GPU, or is left to torch's linear algebra there."""

    waiting = ("_local_scalar_dense", "_linalg_check_errors", "nonzero", "equal", "_linalg_eigh", "linalg_matrix_exp")
    left = ("linalg_qr", "_linalg_svd", "linalg_lu_factor")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket.__name__ in (*self.waiting, *self.left):
            raise AssertionError(f"{func} is called")
        return func(*args, **(kwargs or {}))


#: Manifold and retraction, or None for the exponential map.
MAPS = [("sphere", name) for name in ("projection", "exp", None)] + [("oblique", "projection"), ("oblique", None)]
MAPS += [("stiefel", name) for name in ("qr", "polar", "cayley")]


@pytest.mark.parametrize("size", [(3, 3), (5, 2), (2, 5)], ids=str)
@pytest.mark.parametrize(("of", "name"), MAPS)
def test_maps_and_their_derivatives_make_nobody_wait(of: str, name: str | None, size: tuple[int, int]) -> None:
    """The same numbers as in float64 by the reference, forwards and backwards, without a look at any of them."""
    x = F.projx(of, torch.randn(4, *size, dtype=torch.float64))
    v, weights = torch.randn_like(x), torch.randn_like(x)

    def gradients(x: Tensor, v: Tensor, moved: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        x, v = x.clone().requires_grad_(), v.clone().requires_grad_()
        y = moved(x, F.proj(of, x, 0.3 * v))
        # torch's own backward() has hooks that count; grad() is the same without.
        return [y, *torch.autograd.grad(y, (x, v), weights.to(y.dtype))]

    def moved(x: Tensor, v: Tensor) -> Tensor:
        return F.expmap(of, x, v) if name is None else F.retr(of, x, v, name)

    with NoWaiting():
        found = gradients(x.float(), v.float(), moved)
        F.projx(of, x)
    geometry = GEOMETRIES[manifolds.manifold(of).code]
    by_reference = geometry.expmap if name is None else geometry.retractions[name].retract
    wanted = gradients(x, v, lambda x, v: by_reference(x, v, 1.0))
    for got, want in zip(found, wanted, strict=True):
        # Some dozens of roundings of numbers of size one, and of inverses of matrices of condition below 10.
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1000 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("size", [(3, 3), (8, 8), (4, 7), (20, 20), (40, 3)], ids=str)
def test_decompositions_and_their_derivatives_make_nobody_wait(size: tuple[int, int]) -> None:
    x = torch.randn(3, *size, requires_grad=True)
    functions = (F.qr, F.qf, F.polar) if min(size) <= 3 else (F.qr, F.qf)
    with NoWaiting():
        for function in functions:
            outputs = function(x) if function is F.qr else (function(x),)
            torch.autograd.grad(sum(out.sum() for out in outputs), x)
        F.polar(x.detach())
        with pytest.raises(AssertionError, match="linalg_svd"):
            torch.linalg.svd(x)
