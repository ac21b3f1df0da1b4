"""``functional.qr``, ``qf`` and ``polar`` by the Triton backend, interpreted: what is asked of the CPU's, in sizes that
the interpreter can bear. The environment chooses the backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_functional_qr as suite
import torch
from test_functional_qr import (  # noqa: F401  the tests themselves
    check_families,
    test_empty_batches,
    test_errors_name_the_argument,
    test_transforms,
)
from torch import Tensor
from triton_interpreted import decompositions as kernels

from manifold_kernels import decompositions
from manifold_kernels import functional as F

#: Square, tall and wide, at powers of two and beside them, and single rows and columns.
SIZES = [
    (1, 1),
    (1, 4),
    (2, 2),
    (3, 3),
    (3, 5),
    (4, 4),
    (5, 2),
    (5, 5),
    (6, 8),
    (7, 1),
    (7, 7),
    (8, 8),
    (9, 4),
    (40, 3),
]


@pytest.fixture(autouse=True)
def _by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("MANIFOLD_KERNELS_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("dtype", suite.DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_families(size: tuple[int, int], dtype: torch.dtype) -> None:
    check_families(*size, dtype)


@pytest.mark.long
@pytest.mark.parametrize("dtype", suite.DTYPES)
@pytest.mark.parametrize("size", [(16, 16), (17, 17), (32, 32), (300, 3), (3, 300), (64, 24), (46, 45)], ids=str)
def test_families_of_larger_matrices(size: tuple[int, int], dtype: torch.dtype) -> None:
    check_families(*size, dtype)


@pytest.mark.parametrize("size", [(1, 3), (3, 3), (6, 4)], ids=str)
def test_nan_and_inf_stay_in_their_matrix(size: tuple[int, int]) -> None:
    suite.test_nan_and_inf_stay_in_their_matrix(size, torch.float32)


def test_several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices keep their bits whatever else is in their program, and however many there are."""
    x = torch.randn(37, 3, 2)
    wanted = F.qr(x), F.polar(x)
    monkeypatch.setattr(kernels, "BLOCK", 2**8)
    got = F.qr(x), F.polar(x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_another_implementations_numbers() -> None:
    suite.test_qr_is_torchs_up_to_signs((8, 5))
    suite.test_polar_is_scipys((4, 2))
    suite.test_derivatives_are_torchs((4, 4))
    suite.test_derivatives_are_torchs((3, 6))


@pytest.mark.parametrize("function", [F.qr, F.qf, F.polar])
def test_first_and_second_derivatives(function: Callable[..., Any]) -> None:
    variable = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    # In one direction instead of all.
    assert torch.autograd.gradcheck(function, (variable,), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (variable,), fast_mode=True)


@pytest.mark.parametrize("name", ["triton_qr", "triton_qf", "triton_polar"])
def test_opcheck(name: str) -> None:
    operator = getattr(torch.ops.manifold_kernels, name).default
    torch.library.opcheck(operator, (torch.randn(2, 3, 4, dtype=torch.float64).mT,))
    torch.library.opcheck(operator, (torch.randn(2, 3, 2, requires_grad=True),))


def test_the_backend_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is larger than a program goes to torch's linear algebra, and an argument beats the environment."""
    taken: list[str] = []
    launched = kernels._launch

    def launch(function: Any, x: Tensor, *outputs: Tensor, **constants: Any) -> None:
        taken.append(function.__name__)
        launched(function, x, *outputs, **constants)

    monkeypatch.setattr(kernels, "_launch", launch)
    small, large = torch.randn(2, 3, 3), torch.randn(1, 128, 128)
    for function in (F.qr, F.qf, F.polar):
        function(small)
        function(large)
        function(small, backend="reference")
    assert taken == ["qr", "qr", "polar"]
    monkeypatch.setenv("MANIFOLD_KERNELS_BACKEND", "reference")
    F.qr(small)
    assert taken == ["qr", "qr", "polar"]
    F.qr(small, backend="triton")
    assert taken[-1] == "qr" and len(taken) == 4
    with pytest.raises(ValueError, match="backend: wanted 'auto' or one of"):
        F.qr(small, backend="opengl")
    with pytest.raises(ValueError, match="backend: 'triton' needs parameters on a GPU, got meta"):
        F.qr(small.to("meta"), backend="triton")
    assert decompositions.qr(small.to("meta"))[0].shape == (2, 3, 3)
