"""Exponential maps, Cayley and polar retractions of the compiled kernels against independent mathematics in float64.

``test_cpu_kernels`` compares them with the reference over types, layouts and options; here the reference is no witness.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from cpu_lockstep import compiled, name_of, one_group
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import group, place_, run_steps
from torch import Tensor

from manifold_kernels import functional, ops, views
from manifold_kernels.manifolds import Stiefel
from manifold_kernels.views import Layout

if (missing := ops.extension_error()) is not None:
    pytest.skip(f"the compiled kernels are not there: {missing}", allow_module_level=True)

KERNEL = Layout("kernel")
#: Sizes with bodies of their own, of any size, on either side of square, and those that torch's linear algebra steps.
SIZES = [(2, 2), (3, 3), (4, 4), (5, 5), (7, 7), (16, 16), (4, 2), (5, 3), (3, 5), (9, 8), (17, 17), (20, 14)]
#: Lengths of steps in units of the scale: from rounding to several turns.
LENGTHS = [1e-9, 1e-4, 0.02, 0.3, 0.71, 1.5, 4.0, 30.0]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def points_and_steps(n: int, p: int, dtype: torch.dtype, count: int = 37) -> tuple[Tensor, Tensor]:
    """Stiefel points ``(1, count, n, p)`` as ``dtype`` and tangent gradients that take steps of all lengths."""
    generator = torch.Generator().manual_seed(n * 100 + p)
    w = torch.randn((1, count, n, p), generator=generator, dtype=torch.float64)
    w = place_(Stiefel(), w, KERNEL).to(dtype)
    d = torch.randn(w.shape, generator=generator, dtype=torch.float64)
    tangent = functional.proj("stiefel", w.double(), d)
    lengths = torch.tensor(LENGTHS, dtype=torch.float64).repeat(math.ceil(count / len(LENGTHS)))[:count]
    return w, (tangent / tangent.norm(dim=(-2, -1), keepdim=True) * lengths.reshape(-1, 1, 1)).to(dtype)


def moved(w: Tensor, grad: Tensor, retraction: str) -> Tensor:
    """``R_W(-G)`` by the kernels, one norm and step for each matrix."""
    rows = [group(Stiefel(), retraction=retraction, individual=True)]
    return run_steps(compiled, [w], [[grad]], rows, [{"lr": 1.0}]).params[0]


def upright(x: Tensor) -> np.ndarray:
    return (x.mT if x.shape[-2] < x.shape[-1] else x).double().numpy().reshape(-1, max(x.shape[-2:]), min(x.shape[-2:]))


def geodesic(q: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Edelman, Arias & Smith 1998, section 2.2.2: the formula that holds for square matrices as for tall ones."""
    p = q.shape[1]
    a = q.T @ v
    block = scipy.linalg.expm(np.block([[a, -v.T @ v], [np.eye(p), a]]))
    return np.hstack((q, v)) @ block[:, :p] @ scipy.linalg.expm(-a)


def cayley(q: np.ndarray, v: np.ndarray) -> np.ndarray:
    """(I - B/2)^-1 (I + B/2) Q with the n x n generator itself."""
    one = np.eye(len(q))
    pv = v - q @ (q.T @ v) / 2
    b = pv @ q.T - q @ pv.T
    return np.linalg.solve(one - b / 2, (one + b / 2) @ q)


def polar(q: np.ndarray, v: np.ndarray) -> np.ndarray:
    return scipy.linalg.polar(q + v)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize(("n", "p"), SIZES)
@pytest.mark.parametrize("formula", [geodesic, cayley, polar])
def test_stiefel(formula, n: int, p: int, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    """Short and long steps side by side in a register.

    Bounds: w is off the manifold by a rounding, which a step of length kappa carries along its arc. An element is made
    of three products of n terms, roundings of eps/2 each that add up like a random walk, and of squarings, at most
    2 kappa of them, each of which doubles what it is given: ``(3 + sqrt(n)) (1 + kappa) eps``. The formula for tall
    matrices exponentiates V^T V, of size kappa^2, and its roundings. In float64 the witness is off by as much, and
    where it takes singular values, all equal on the manifold, by up to 23 eps (see ``cpu_lockstep``).
    """
    w, grad = points_and_steps(n, p, dtype)
    name = {geodesic: "exp", cayley: "cayley", polar: "polar"}[formula]
    got = upright(moved(w, grad, name))
    eps = torch.finfo(dtype).eps
    for q, g, y in zip(upright(w), upright(grad), got, strict=True):
        wanted = scipy.linalg.polar(formula(q, -g))[0]  # of a w that is on the manifold to rounding
        kappa = float(np.linalg.norm(g))
        bound = ((3 + math.sqrt(n)) * (1 + kappa) + (kappa**2 if formula is geodesic and n != p else 0)) * eps
        assert np.abs(y - wanted).max() <= (2 * bound + 23 * eps if dtype == torch.float64 else bound)
        # On the manifold to the roundings of the last product and of this one: what the ending is there for.
        assert np.abs(y.T @ y - np.eye(min(n, p))).max() <= 3 * eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(("n", "p"), [(3, 3), (5, 5), (4, 4), (5, 3)])
@pytest.mark.parametrize("retraction", ["exp", "cayley", "polar"])
def test_neighbours_do_not_change_bits(retraction: str, n: int, p: int, dtype: torch.dtype) -> None:
    """A matrix moves by itself as it does among matrices that need other numbers of halvings and iterations."""
    w, grad = points_and_steps(n, p, torch.float32)
    w, grad = w.to(dtype), grad.to(dtype)
    among = moved(w, grad, retraction)
    for k in range(w.shape[1]):
        assert torch.equal(moved(w[:, k : k + 1], grad[:, k : k + 1], retraction)[0, 0], among[0, k])
    order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(0))
    assert torch.equal(moved(w[:, order], grad[:, order], retraction), among[:, order])
    last = [t.to(memory_format=torch.channels_last) for t in (w, grad)]
    assert torch.equal(moved(*last, retraction), among)


@pytest.mark.parametrize("retraction", ["exp", "cayley", "polar", "qr"])
@pytest.mark.parametrize(("n", "p"), [(3, 3), (5, 5), (4, 4), (5, 3)])
def test_rounding_errors_do_not_add_up(n: int, p: int, retraction: str) -> None:
    """A thousand steps of a few tenths: as close to the manifold as one."""
    generator = torch.Generator().manual_seed(0)
    w = place_(Stiefel(), torch.randn((4, 8, n, p), generator=generator, dtype=torch.float64), KERNEL).float()
    grads = ([torch.randn(w.shape, generator=generator)] for _ in itertools.count())
    rows = [group(Stiefel(), retraction=retraction, individual=True)]
    run = run_steps(compiled, [w], lambda _: next(grads), rows, [{"lr": 0.1, "momentum": 0.9}], count=1000)
    y = upright(run.params[0])
    off = np.abs(np.einsum("kij,kil->kjl", y, y) - np.eye(p)).max()
    assert off <= (3 + n + p if retraction == "qr" else 3) * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("size", [0.5, 3.0, 1e-3, 1e4])
@pytest.mark.parametrize("retraction", ["exp", "cayley", "polar"])
def test_a_weight_far_off_is_brought_back(retraction: str, size: float) -> None:
    """Too far for an iteration that starts near: the nearest orthonormal matrix all the same, neighbours as ever."""
    w, grad = points_and_steps(3, 3, torch.float32)
    spoiled = w.clone()
    spoiled[0, ::5] *= size
    # A matrix of unequal columns, which is not a multiple of an orthonormal one.
    spoiled[0, 1, :, 0] *= size
    got = moved(spoiled, torch.zeros_like(grad), retraction)
    wanted = np.stack([scipy.linalg.polar(q)[0] for q in upright(spoiled)])
    # The iteration squares its errors; rotations of a matrix with columns 1e4 apart are accurate column by column.
    np.testing.assert_allclose(upright(got), wanted, rtol=0, atol=20 * torch.finfo(torch.float32).eps)
    expected = moved(w, grad, retraction)
    keep = torch.ones(w.shape[1], dtype=torch.bool)
    keep[::5] = False
    keep[1] = False
    assert torch.equal(moved(spoiled, grad, retraction)[0, keep], expected[0, keep])


# --- sin and cos ------------------------------------------------------------------------------------------------------


def arc(angle: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of float32 angles by the kernels: unit vectors of the plane, moved along a geodesic by sphere's exp.

    The kernels normalise the end, which leaves the quotient of sin and cos: one vector for each angle, 256 at a time.
    """
    count = angle.numel()
    w = torch.zeros(1, count, 2, 2)
    w[0, :, 0, 0] = 1
    grad = torch.zeros_like(w)
    grad[0, :, 1, 1] = -angle * flip
    end = run_steps(compiled, [w], [[grad]], [group("sphere", retraction="exp", individual=True)], [{"lr": 1.0}])
    return end.params[0][0, :, 0, 0].double(), (end.params[0][0, :, 1, 1] * flip).double()


def assert_on_circle(angle: Tensor) -> None:
    """sin and cos within 2 units in the last place, a square, a sum, a root, a quotient and a product of eps/2 each."""
    flip = torch.where(torch.arange(angle.numel()) % 2 == 0, 1.0, -1.0)
    cosine, sine = arc(angle, flip)
    exact = angle.double()
    eps = torch.finfo(torch.float32).eps
    # Squares below 1e-38 vanish, the step with them.
    assert bool(((cosine - exact.cos()).abs() <= 4.5 * eps * exact.cos().abs()).all())
    assert bool(((sine - exact.sin()).abs() <= 4.5 * eps * exact.sin().abs() + 1e-19).all())


def test_sine_and_cosine_of_a_grid() -> None:
    """Every quadrant up to forty turns, where polynomials end, and beyond, where libm takes over."""
    assert_on_circle(torch.linspace(0, 260, 40001))
    assert_on_circle(torch.logspace(-12, 6, 4001))


def test_sine_and_cosine_near_their_zeros() -> None:
    """The floats nearest to multiples of pi/2, where all but a few bits of the angle cancel."""
    multiples = torch.arange(1, 166, dtype=torch.float64) * (math.pi / 2)
    near = multiples.float()
    for _ in range(3):
        assert_on_circle(near)
        near = torch.nextafter(near, torch.full_like(near, math.inf))


@settings(max_examples=30)
@given(st.lists(st.floats(0, 300, width=32, allow_subnormal=False), min_size=1, max_size=40))
def test_sine_and_cosine_of_anything(angles: list[float]) -> None:
    assert_on_circle(torch.tensor(angles, dtype=torch.float32))


@pytest.mark.parametrize("of", ["sphere", "oblique"])
@pytest.mark.parametrize("length", [1e-6, 0.1, 1.0, 3.0, 50.0, 1000.0])
def test_geodesics_of_vectors(of: str, length: float) -> None:
    """``cos(t) w + sin(t) u`` in float64: fixed sizes, any size, columns, and vectors with elements in lanes."""
    for shape in ((3, 9, 3, 3), (2, 11, 5, 5), (2, 5, 2, 3), (2, 3, 40, 2)):
        case = one_group(of, "exp", shape, KERNEL, individual=True, seed=7)
        w = case.weight
        columns = of == "oblique"
        generator = torch.Generator().manual_seed(1)
        d = functional.proj(of, w.double(), torch.randn(shape, generator=generator, dtype=torch.float64))
        dims = (-2,) if columns else (-2, -1)
        grad = (d / d.norm(dim=dims, keepdim=True) * length).float()
        got = run_steps(compiled, [w], [[grad]], case.groups, [{"lr": 1.0}]).params[0].double()
        # What the kernels see of the gradient is its tangent part.
        tangent = functional.proj(of, w.double(), grad.double())
        angle = tangent.norm(dim=dims, keepdim=True)
        wanted = w.double() * angle.cos() - tangent / angle * angle.sin()
        wanted = wanted / wanted.norm(dim=dims, keepdim=True)
        # An angle of `length` has roundings of that size; w, projection, norm and end about 3 + sqrt(k)/4.
        count = views.shape_of(w, KERNEL).n * (1 if columns else views.shape_of(w, KERNEL).p)
        bound = (3 + math.sqrt(count) / 4) * torch.finfo(torch.float32).eps * (1 + length)
        assert float((got - wanted).abs().max()) <= bound
