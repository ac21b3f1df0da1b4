"""Batched QR and polar decompositions: judged as LAPACK does, to the bit over batches and threads, differentiated."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import scipy.linalg
import torch
from matrix_families import families, lapack_unit, one_norm, orthogonality, residual
from torch import Tensor

from manifold_kernels import decompositions, ops
from manifold_kernels import functional as F

#: LAPACK's own pass mark is 30; 5 is what orthogonal transformations without pivoting stay below.
LIMIT = 5.0
DTYPES = (torch.float32, torch.float64)
#: Every n x p below a register's doubles, then some of either side; the last go to torch's linear algebra.
SMALL = [(n, p) for n in range(1, 9) for p in range(1, 9)]
SQUARE = [(n, n) for n in range(9, 34)]
OTHERS = [(2 * n + 1, n) for n in range(9, 23)] + [(n, 2 * n + 1) for n in range(9, 23)]
LONG = [(64, 32), (32, 64), (300, 3), (3, 300), (2048, 1), (1, 2048), (45, 45), (46, 45), (80, 40), (40, 80)]
IMPLEMENTATIONS = {
    "operators": (decompositions.qr, decompositions.polar),
    "torch": (decompositions.torch_qr, decompositions.torch_polar),
}
#: Batches of all families that are put together where bits are compared.
COPIES = 60
compiled = pytest.mark.skipif(ops.extension_error() is not None, reason="the compiled kernels are not there")


def worst_qr(qr: Callable[[Tensor], tuple[Tensor, Tensor]], a: Tensor) -> Tensor:
    """LAPACK's larger ratio for every matrix, infinite where R is not upper triangular with diagonal >= 0."""
    q, r = qr(a)
    assert q.is_contiguous() and r.is_contiguous()
    proper = (r.diagonal(dim1=-2, dim2=-1) >= 0).all(-1) & (r == r.triu()).flatten(-2).all(-1)
    ratio = torch.maximum(orthogonality(q), residual(a, q, r))
    return torch.where(proper & ratio.isfinite(), ratio, math.inf)


def worst_polar(polar: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
    """How far Q H is from A and Q from orthonormal, H = Q^T A from symmetric and from having no negative eigenvalue."""
    q = polar(a)
    assert q.is_contiguous()
    if a.shape[-2] < a.shape[-1]:
        a, q = a.mT, q.mT
    largest = a.double().abs().amax((-2, -1), keepdim=True)
    scaled = a.double() / torch.where(largest == 0, 1, largest)
    h = q.double().mT @ scaled
    size = one_norm(scaled) * lapack_unit(a)
    size = torch.where(size == 0, 1, size)
    ratio = torch.maximum(orthogonality(q), residual(scaled.to(a.dtype), q, (h + h.mT) / 2))
    ratio = torch.maximum(ratio, one_norm(h - h.mT) / size)
    least = torch.linalg.eigvalsh(torch.where(h.isfinite(), h + h.mT, 0))[..., 0] / 2
    return torch.maximum(ratio.nan_to_num(math.inf), -least / size)


def check_families(n: int, p: int, dtype: torch.dtype, implementation: str = "operators") -> None:
    """Every family in neighbouring lanes."""
    qr, polar = IMPLEMENTATIONS[implementation]
    named = families(n, p, dtype)
    batch = torch.stack(list(named.values()))
    for what, ratios in (("qr", worst_qr(qr, batch)), ("polar", worst_polar(polar, batch))):
        for name, ratio in zip(named, ratios.tolist(), strict=True):
            assert ratio < LIMIT, f"{what} of {n} x {p} {name}: {ratio}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [SMALL, SQUARE, OTHERS, LONG], ids=["small", "square", "others", "long"])
def test_families(sizes: list[tuple[int, int]], dtype: torch.dtype) -> None:
    for n, p in sizes:
        check_families(n, p, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_families_by_torch(dtype: torch.dtype) -> None:
    """What other devices, and installations without the kernels, compute."""
    for n, p in [(1, 1), (1, 4), (3, 3), (7, 4), (4, 7), (33, 33)]:
        check_families(n, p, dtype, "torch")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_column_is_accurate_by_itself(dtype: torch.dtype) -> None:
    """Householder's QR is backward stable column by column (Higham 2002, Theorem 19.4)."""
    for n, p in [(3, 3), (9, 5), (4, 7), (32, 32)]:
        a = families(n, p, dtype)["columns of many sizes"]
        q, r = F.qr(a)
        lengths = a.double().norm(dim=0)
        rest = (a.double() - q.double() @ r.double()).norm(dim=0) / lengths
        assert float(rest.max()) < LIMIT * lapack_unit(a)


@pytest.mark.parametrize("size", [(3, 3), (4, 4), (8, 5), (20, 20), (64, 32), (50, 45)])
def test_qr_is_torchs_up_to_signs(size: tuple[int, int]) -> None:
    a = torch.randn(5, *size, dtype=torch.float64)
    q, r = F.qr(a)
    wanted_q, wanted_r = torch.linalg.qr(a)
    sign = wanted_r.diagonal(dim1=-2, dim2=-1).sign()
    # Q and R change by the condition number of A, here below 1e4, times some n eps.
    bound = 1e4 * 10 * lapack_unit(a)
    torch.testing.assert_close(q, wanted_q * sign.unsqueeze(-2), rtol=0, atol=bound)
    torch.testing.assert_close(r, wanted_r * sign.unsqueeze(-1), rtol=0, atol=bound)
    assert torch.equal(F.qf(a), q)


@pytest.mark.parametrize("size", [(3, 3), (4, 2), (2, 5), (12, 12), (40, 20)])
def test_polar_is_scipys(size: tuple[int, int]) -> None:
    a = torch.randn(5, *size, dtype=torch.float64)
    wanted = torch.stack([torch.from_numpy(scipy.linalg.polar(one.numpy())[0]) for one in a])
    # The condition of the factor is 2/(sum of the two smallest singular values), below 100 for these.
    torch.testing.assert_close(F.polar(a), wanted, rtol=0, atol=1e3 * lapack_unit(a))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 3), (6, 4), (4, 6), (20, 20), (46, 45)])
def test_nan_and_inf_stay_in_their_matrix(size: tuple[int, int], dtype: torch.dtype) -> None:
    a = torch.randn(40, *size, dtype=dtype)
    sick = a.clone()
    for place, value in ((3, math.nan), (17, math.inf), (39, -math.inf)):
        sick[place].flatten()[place % sick[0].numel()] = value
    well = [i for i in range(40) if i not in (3, 17, 39)]
    (q, r), (sick_q, sick_r) = F.qr(a), F.qr(sick)
    polar, sick_polar = F.polar(a), F.polar(sick)
    for healthy, other in ((q, sick_q), (r, sick_r), (polar, sick_polar), (q, F.qf(sick))):
        assert torch.equal(healthy[well], other[well])
    for i in (3, 17, 39):
        assert bool(sick_q[i].isnan().all()) and bool(sick_polar[i].isnan().all())
        assert bool(sick_r[i].isnan()[torch.ones(r.shape[1:]).triu().bool()].all())


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(3, 3), (5, 5), (7, 4), (4, 7), (17, 17)])
def test_same_bits_anywhere(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Whatever the number of threads, the place in the batch, the neighbours and the strides."""
    a = torch.cat([torch.stack(list(families(*size, dtype, seed).values())) for seed in range(COPIES)])
    functions = (lambda x: F.qr(x)[0], lambda x: F.qr(x)[1], F.qf, F.polar)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = [f(a) for f in functions]
        order = torch.randperm(len(a))
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for f, out in zip(functions, wanted, strict=True):
                assert torch.equal(f(a), out)
                assert torch.equal(f(a[order]), out[order])
                for begin, end in pairwise((0, 1, 4, 21, 50)):
                    assert torch.equal(f(a[begin:end]), out[begin:end])
    finally:
        torch.set_num_threads(before)
    for f, out in zip(functions, wanted, strict=True):
        assert torch.equal(f(a.mT.contiguous().mT), out)
        assert torch.equal(f(a.movedim(0, -1).contiguous().movedim(-1, 0)), out)
        assert torch.equal(f(a.view(COPIES, -1, *size)), out.view(COPIES, -1, *out.shape[1:]))
        assert torch.equal(f(a[0]), out[0])
        assert torch.equal(f(a[0].expand(3, 2, *size)), out[0].expand(3, 2, *out.shape[1:]))


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 4, 3), (0, 60, 60)])
def test_empty_batches(shape: tuple[int, ...]) -> None:
    q, r = F.qr(torch.empty(shape))
    assert q.shape == shape and r.shape == (*shape[:-2], shape[-1], shape[-1])
    assert F.qf(torch.empty(shape)).shape == shape and F.polar(torch.empty(shape)).shape == shape


SIZES_TO_DIFFERENTIATE = [(3, 3), (5, 3), (2, 4), (1, 3), (3, 1), (4, 4)]


@pytest.mark.parametrize("size", SIZES_TO_DIFFERENTIATE)
def test_first_and_second_derivatives(size: tuple[int, int]) -> None:
    x = torch.randn(2, *size, dtype=torch.float64)
    for point in (x, F.polar(x)):  # all singular values of the second agree
        variable = point.clone().requires_grad_()
        for function in (F.qr, F.qf, F.polar):
            assert torch.autograd.gradcheck(function, (variable,))
            assert torch.autograd.gradgradcheck(function, (variable,))


@pytest.mark.parametrize("size", [(4, 4), (6, 3), (3, 6)])
def test_derivatives_are_torchs(size: tuple[int, int]) -> None:
    """Automatic differentiation of torch's own QR and, through singular values that differ, of its SVD."""
    x = torch.randn(3, *size, dtype=torch.float64, requires_grad=True)
    q, r = torch.linalg.qr(x)
    sign = r.diagonal(dim1=-2, dim2=-1).sign().detach()
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    pairs = (
        (F.qr(x)[0], q * sign.unsqueeze(-2)),
        (F.qr(x)[1], r * sign.unsqueeze(-1)),
        (F.qf(x), q * sign.unsqueeze(-2)),
        (F.polar(x), u @ vh),
    )
    for ours, theirs in pairs:
        weights = torch.randn_like(ours)
        got, wanted = (torch.autograd.grad((weights * out).sum(), x, retain_graph=True)[0] for out in (ours, theirs))
        # The inverse of R, or of differences of singular values, thrice: below 1e6 for these.
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(3, 3), (5, 2), (2, 5), (46, 45)])
@pytest.mark.parametrize("name", ["qr", "qf", "polar"])
def test_opcheck(name: str, size: tuple[int, int]) -> None:
    operator = getattr(torch.ops.manifold_kernels, name).default
    for x in (torch.randn(4, *size), torch.randn(*size[::-1], 2, dtype=torch.float64).mT.movedim(0, -1).contiguous()):
        torch.library.opcheck(operator, (x,))
        torch.library.opcheck(operator, (x.detach().clone().requires_grad_(),))


def test_transforms() -> None:
    """Under torch.func and torch.compile the same numbers come out."""
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    for function in (F.qr, F.qf, F.polar):
        torch.testing.assert_close(torch.func.vmap(function)(x), function(x), rtol=0, atol=0)
        torch.testing.assert_close(
            torch.func.vmap(function, in_dims=2, out_dims=0)(x.movedim(0, 2)), function(x), rtol=0, atol=0
        )

    def loss(a: Tensor) -> Tensor:
        q, r = F.qr(a)
        return (q[..., 0] * F.polar(a)[..., 1]).sum() + (F.qf(a) @ r).square().sum()

    variable = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(variable), variable)
    torch.testing.assert_close(torch.func.grad(loss)(x), wanted)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), wanted)
    through = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (got,) = torch.autograd.grad(through(variable), variable)
    torch.testing.assert_close(got, wanted)


def test_errors_name_the_argument() -> None:
    for function in (F.qr, F.qf, F.polar, decompositions.qr, decompositions.qf, decompositions.polar):
        for dtype in (torch.float16, torch.bfloat16, torch.int64):
            with pytest.raises(TypeError, match=r"x: wanted float32 or float64, got .*\.float\(\)"):
                function(torch.ones(2, 3, 3, dtype=dtype))
        for shape in ((3,), (2, 0, 3), (2, 3, 0)):
            with pytest.raises(ValueError, match=r"x: wanted matrices \(\.\.\., n, p\) with n, p >= 1, got shape"):
                function(torch.ones(shape))


#: ATEN_CPU_CAPABILITY, the kernels that are to be taken, and whether the processor can.
CAPABILITIES = {
    "default": ("baseline", lambda: True),
    "avx2": ("avx2", torch.cpu._is_avx2_supported),
    "avx512": ("avx512", torch.cpu._is_avx512_supported),
}


@compiled
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_instruction_sets(capability: str) -> None:
    """The kernels that older processors take, in processes of their own."""
    wanted, supported = CAPABILITIES[capability]
    if not supported():
        pytest.skip(f"this processor has no {capability}")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, __file__], env=environment, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kernels"] == wanted and report["sizes"] > 60


def main() -> None:
    from manifold_kernels import _C

    sizes = [*SMALL, (9, 9), (17, 17), (33, 33), (25, 12), (12, 25)]
    for dtype in DTYPES:
        for n, p in sizes:
            check_families(n, p, dtype)
    print(json.dumps({"kernels": _C.build_info()["instruction_set"], "sizes": len(sizes)}))


if __name__ == "__main__":
    main()
