"""The functional API against its defining properties and against numpy and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from manifold_kernels import functional as F
from manifold_kernels import manifolds
from manifold_kernels.manifolds import Euclidean, Grassmann, Manifold, Oblique, ScaleInvariant, Sphere, Stiefel
from manifold_kernels.reference.registry import GEOMETRIES
from manifold_kernels.views import Layout

EPS = torch.finfo(torch.float64).eps
CURVED: list[tuple[Manifold, tuple[int, int]]] = [
    (Sphere(), (4, 3)),
    (Sphere(0.3), (7, 1)),
    (Oblique(), (5, 3)),
    (Oblique(2.5), (3, 5)),
    (Stiefel(), (5, 3)),
    (Stiefel(), (3, 3)),
    (Stiefel(0.2), (6, 2)),
    (Stiefel(4.0), (2, 5)),
    (Grassmann(), (6, 1)),
]
ALL = [*CURVED, (Euclidean(), (3, 2)), (ScaleInvariant(), (5, 1))]
RETRACTIONS = [(of, size, name) for of, size in ALL for name in of.retractions]
BATCH = 6


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def ids(value: object) -> str | None:
    return repr(value) if isinstance(value, Manifold) else None


def ambient(size: tuple[int, int]) -> Tensor:
    return torch.randn(BATCH, *size, dtype=torch.float64)


def tangent(of: Manifold, size: tuple[int, int], length: float = 1.0) -> tuple[Tensor, Tensor]:
    """A point and a tangent vector of ``length`` times the scale (per matrix)."""
    x = F.projx(of, ambient(size))
    v = F.proj(of, x, ambient(size))
    return x, v * (length * scale(of) / v.flatten(1).norm(dim=1)[:, None, None])


def scale(of: Manifold) -> float:
    s = getattr(of, "scale", "unit")
    return 1.0 if s == "unit" else float(s)


def constraint(of: Manifold, x: np.ndarray) -> np.ndarray:
    """The numbers that vanish on the manifold, written with numpy for one matrix."""
    s = scale(of)
    if of.name in ("sphere", "grassmann"):
        return np.array([(x * x).sum() / s**2 - 1])
    if of.name == "oblique":
        return (x * x).sum(0) / s**2 - 1
    if of.name == "stiefel":
        gram = x @ x.T if x.shape[0] < x.shape[1] else x.T @ x
        return (gram / s**2 - np.eye(len(gram)))[np.triu_indices(len(gram))]
    return np.zeros(0)


def dimension(of: Manifold, size: tuple[int, int]) -> int:
    n, p = size
    k = min(n, p)
    codimension = {"sphere": 1, "grassmann": 1, "scale_invariant": 1, "oblique": p, "stiefel": k * (k + 1) // 2}
    return n * p - codimension.get(of.name, 0)


def slope(errors: list[Tensor], factor: float) -> float:
    """The order of convergence: by how many powers of ``factor`` the largest error fell."""
    first, last = (float(error.abs().max()) for error in errors)
    return math.log(first / last) / math.log(factor)


def test_registry_agrees_with_descriptions() -> None:
    assert sorted(GEOMETRIES) == sorted(of.code for of in manifolds.MANIFOLDS)
    for of in manifolds.MANIFOLDS:
        assert tuple(GEOMETRIES[of.code].retractions) == of.retractions


@pytest.mark.parametrize(("of", "size"), ALL, ids=ids)
def test_proj_is_the_orthogonal_projection(of: Manifold, size: tuple[int, int]) -> None:
    x = F.projx(of, ambient(size))
    u, v = ambient(size), ambient(size)
    pu, pv = F.proj(of, x, u), F.proj(of, x, v)
    # A dozen products and sums of numbers of size one to ten.
    torch.testing.assert_close(F.proj(of, x, pu), pu, rtol=0, atol=100 * EPS)
    torch.testing.assert_close((pu * v).sum((1, 2)), (u * pv).sum((1, 2)), rtol=0, atol=400 * EPS)
    # Idempotent and self-adjoint: an orthogonal projection. Its rank tells that it is onto the tangent space.
    n = size[0] * size[1]
    basis = torch.eye(n, dtype=torch.float64).reshape(n, *size)
    image = F.proj(of, x[:1].expand(n, *size), basis).reshape(n, n)
    assert int(torch.linalg.matrix_rank(image, atol=1e-10)) == dimension(of, size)
    for point, v in zip(x.numpy(), pu.numpy(), strict=True):
        # Central differences: the constraints are quadratic, so that only rounding (eps/t = 1e-12) remains.
        t = 1e-4
        along = (constraint(of, point + t * v) - constraint(of, point - t * v)) / (2 * t)
        np.testing.assert_allclose(along, 0, atol=1e-10 / min(scale(of), 1))


@pytest.mark.parametrize(("of", "size"), CURVED, ids=ids)
def test_projx_is_the_nearest_point(of: Manifold, size: tuple[int, int]) -> None:
    y = ambient(size)
    x = F.projx(of, y)
    for point in x.numpy():
        np.testing.assert_allclose(constraint(of, point), 0, atol=20 * EPS)
    nearest = (x - y).flatten(1).norm(dim=1)
    for t in (1e-3, 0.1, 1.0):
        other = F.retr(of, x, t * F.proj(of, x, ambient(size)))
        assert bool(((other - y).flatten(1).norm(dim=1) >= nearest * (1 - 1e-12)).all())
    torch.testing.assert_close(F.projx(of, x), x, rtol=0, atol=20 * EPS * scale(of))


@pytest.mark.parametrize(("of", "size", "name"), RETRACTIONS, ids=ids)
def test_retr_stays_on_the_manifold_and_starts_along_v(of: Manifold, size: tuple[int, int], name: str) -> None:
    x, v = tangent(of, size)
    torch.testing.assert_close(F.retr(of, x, 0 * v, name), x, rtol=0, atol=20 * EPS * scale(of) * BATCH)
    for length in (1e-8, 0.3, 1.0, 3.0):
        for point in F.retr(of, x, length * v, name).numpy():
            # Cayley and exp lose eps times the norm of their matrices and gain it back in the last Newton-Schulz step.
            np.testing.assert_allclose(constraint(of, point), 0, atol=50 * EPS)
    errors = [F.retr(of, x, t * v, name) - (x + t * v) for t in (1e-2, 1e-3)]
    assert errors[0].abs().max() == 0 or name == "add" or slope(errors, 10) > 1.9


@pytest.mark.parametrize(
    ("of", "size", "name", "order"),
    [
        (of, size, name, 1.9 if name in ("qr", "cayley") else 2.9)
        for of, size, name in RETRACTIONS
        if name not in ("add", "exp")
    ],
    ids=ids,
)
def test_retr_follows_the_geodesic(of: Manifold, size: tuple[int, int], name: str, order: float) -> None:
    """QR is first order, the projections (polar, normalisation) are second-order retractions (Absil & Malick 2012)."""
    x, v = tangent(of, size)
    assert slope([F.retr(of, x, t * v, name) - F.expmap(of, x, t * v) for t in (3e-2, 3e-3)], 10) > order


def exponential(of: Manifold, x: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The exponential map of one matrix through rotations: products of exponentials of skew matrices."""
    s = scale(of)
    if of.name == "oblique":
        columns = [exponential(Sphere(s), x[:, [j]], v[:, [j]]) for j in range(x.shape[1])]
        return np.concatenate(columns, 1)
    if of.name == "stiefel":
        if x.shape[0] < x.shape[1]:
            return exponential(of, x.T, v.T).T
        q, u = x / s, v / s
        # Zimmermann & Hueper 2022, the geodesics of the Euclidean metric.
        return s * scipy.linalg.expm(u @ q.T - q @ u.T) @ q @ scipy.linalg.expm(-q.T @ u)
    q, u = x.reshape(-1, 1) / s, v.reshape(-1, 1) / s
    return s * (scipy.linalg.expm(u @ q.T - q @ u.T) @ q).reshape(x.shape)


@pytest.mark.parametrize(("of", "size"), CURVED, ids=ids)
@pytest.mark.parametrize("length", [1e-9, 0.5, 3.0])
def test_expmap_is_a_rotation(of: Manifold, size: tuple[int, int], length: float) -> None:
    x, v = tangent(of, size, length)
    expected = np.stack([exponential(of, a, b) for a, b in zip(x.numpy(), v.numpy(), strict=True)])
    # Scaling and squaring at norms up to 3^2 (Edelman's block holds X^T X): some hundred roundings.
    np.testing.assert_allclose(F.expmap(of, x, v).numpy(), expected, rtol=0, atol=300 * EPS * scale(of))


@pytest.mark.parametrize(("of", "size"), CURVED, ids=ids)
def test_expmap_is_a_geodesic(of: Manifold, size: tuple[int, int]) -> None:
    """The acceleration has no tangential part, and the speed is constant."""
    x, v = tangent(of, size)
    h = 1e-3
    for t in (0.0, 0.7):
        before, now, after = (F.expmap(of, x, (t + dt) * v) for dt in (-h, 0, h))
        acceleration = F.proj(of, now, (after - 2 * now + before) / h**2)
        # The fourth derivative leaves h^2 |v|^4/12 times a small number; rounding leaves 10 eps/h^2 = 2e-9.
        assert float(acceleration.abs().max()) < 1e-5 * scale(of)
        speed = ((after - before) / (2 * h)).flatten(1).norm(dim=1) / scale(of)
        torch.testing.assert_close(speed, torch.ones_like(speed), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("n", "p", "s"), [(5, 3, 1.0), (3, 3, 0.5), (2, 4, 2.0)])
def test_cayley_is_the_cayley_transform(n: int, p: int, s: float) -> None:
    x, v = tangent(Stiefel(s), (n, p), 0.9)
    moved = F.retr(Stiefel(s), x, v, "cayley")
    if n < p:
        x, v, moved = x.mT, v.mT, moved.mT
    for a, b, c in zip(x.numpy() / s, v.numpy() / s, moved.numpy() / s, strict=True):
        half = b - a @ (a.T @ b) / 2
        skew = half @ a.T - a @ half.T
        one = np.eye(len(a))
        np.testing.assert_allclose(c, np.linalg.solve(one - skew / 2, (one + skew / 2) @ a), rtol=0, atol=100 * EPS)


@pytest.mark.parametrize("size", [(5, 3), (3, 3), (2, 6)])
def test_polar_against_scipy(size: tuple[int, int]) -> None:
    x = ambient(size)
    expected = np.stack([scipy.linalg.polar(a)[0] for a in x.numpy()])
    # The factor's condition number is 2/(sum of the two smallest singular values), below 100 for these.
    np.testing.assert_allclose(F.polar(x).numpy(), expected, rtol=0, atol=1e3 * EPS)


def qr_families(m: int, n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """LAPACK's test matrices (xCHKGE types), as one matrix each."""
    a = torch.randn(m, n, dtype=torch.float64)
    u, _, vt = torch.linalg.svd(a, full_matrices=False)
    eps, tiny, huge = torch.finfo(dtype).eps, torch.finfo(dtype).tiny, torch.finfo(dtype).max
    zero, twice = a.clone(), a.clone()
    zero[:, n // 2] = 0
    twice[:, -1] = twice[:, 0]

    def graded(smallest: float) -> Tensor:
        return u * torch.logspace(0, math.log10(smallest), n, dtype=torch.float64) @ vt

    families = {
        "random": a,
        "diagonal": torch.eye(m, n, dtype=torch.float64) * torch.arange(1, n + 1, dtype=torch.float64),
        "negative": -torch.eye(m, n, dtype=torch.float64),
        "condition 10": graded(0.1),
        "condition 0.1/eps": graded(eps * 10),
        "near underflow": a * tiny * 1e3,
        "near overflow": a / a.abs().max() * huge / (10 * m),
        "zero column": zero,
        "duplicate columns": twice,
        "zero": torch.zeros(m, n, dtype=torch.float64),
    }
    return {name: matrix.to(dtype) for name, matrix in families.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (7, 5), (40, 12), (3, 6)])
def test_qr_has_lapack_residuals(size: tuple[int, int], dtype: torch.dtype) -> None:
    m, n = size
    eps = torch.finfo(dtype).eps
    for name, a in qr_families(m, min(m, n), dtype).items():
        if n > m:
            a = torch.cat((a, a.flip(1)), 1)
        q, r = (x.double() for x in F.qr(a))
        a = a.double()
        one = torch.eye(q.shape[1], dtype=torch.float64)
        # LAPACK's own pass mark is 30; 5 is what the project asks for.
        assert torch.linalg.matrix_norm(one - q.mT @ q, 1) / (m * eps) < 5, name
        size_of_a = torch.linalg.matrix_norm(a, 1)
        residual = torch.linalg.matrix_norm(a - q @ r, 1)
        assert residual == 0 or residual / (size_of_a * m * eps) < 5, name
        assert bool((r.diagonal() >= 0).all()), name
        assert torch.equal(r, r.triu()), name


def test_qr_is_unique() -> None:
    """The Cholesky factor of the Gram matrix is the R with positive diagonal: another route to the same Q."""
    a = torch.randn(8, 6, 4, dtype=torch.float64)
    q, r = F.qr(a)
    for one, q1, r1 in zip(a.numpy(), q.numpy(), r.numpy(), strict=True):
        upper = np.linalg.cholesky(one.T @ one).T
        # The Gram matrix squares the condition number, below 20 for these.
        np.testing.assert_allclose(r1, upper, rtol=0, atol=1e4 * EPS)
        np.testing.assert_allclose(
            q1, scipy.linalg.solve_triangular(upper.T, one.T, lower=True).T, rtol=0, atol=1e4 * EPS
        )


@pytest.mark.parametrize(("of", "size"), ALL, ids=ids)
def test_egrad2rgrad_represents_the_differential(of: Manifold, size: tuple[int, int]) -> None:
    """``<grad f, v>_x = Df(x)[v]`` for every tangent v, for a function that is scale-invariant as PSI demands."""
    x = F.projx(of, ambient(size)).requires_grad_()
    weights = ambient(size)
    f = (weights * x / x.flatten(1).norm(dim=1)[:, None, None]).sum((1, 2))
    (egrad,) = torch.autograd.grad(f.sum(), x)
    x = x.detach()
    v = F.proj(of, x, ambient(size))
    rgrad = F.egrad2rgrad(of, x, egrad)
    torch.testing.assert_close(F.proj(of, x, rgrad), rgrad, rtol=0, atol=1e-13 * max(1, 1 / scale(of)))
    t = 1e-5
    moved = [F.projx(of, x + dt * v) for dt in (t, -t)]
    plus, minus = ((weights * y / y.flatten(1).norm(dim=1)[:, None, None]).sum((1, 2)) for y in moved)
    # Central differences: t^2 times third derivatives, which grow as 1/s^3.
    torch.testing.assert_close(
        F.inner(of, x, rgrad, v), (plus - minus) / (2 * t), rtol=0, atol=1e-8 / min(scale(of), 1) ** 3
    )
    torch.testing.assert_close(F.norm(of, x, v) ** 2, F.inner(of, x, v, v))


def test_scale_invariant_metric_does_not_see_the_scale() -> None:
    x, v = ambient((5, 1)), ambient((5, 1))
    of = ScaleInvariant()
    torch.testing.assert_close(F.norm(of, 8 * x, 8 * v), F.norm(of, x, v), rtol=4 * EPS, atol=0)
    torch.testing.assert_close(F.dist(of, 8 * x, v), F.dist(of, x, 3 * v), rtol=8 * EPS, atol=0)


@pytest.mark.parametrize(("of", "size"), [(of, size) for of, size in CURVED if of.name != "stiefel"], ids=ids)
@pytest.mark.parametrize("length", [1e-9, 0.4, 1.5])
def test_dist_is_the_length_of_the_geodesic(of: Manifold, size: tuple[int, int], length: float) -> None:
    x, v = tangent(of, size, length)
    y = F.expmap(of, x, v)
    expected = torch.full((BATCH,), length * scale(of), dtype=torch.float64)
    # Points are rounded to eps s, which is all that a short distance can know.
    torch.testing.assert_close(F.dist(of, x, y), expected, rtol=1e-14, atol=20 * EPS * scale(of))
    torch.testing.assert_close(F.dist(of, y, x), F.dist(of, x, y), rtol=0, atol=4 * EPS * scale(of))


def test_dist_at_the_far_end() -> None:
    x, _ = tangent(Sphere(2.0), (4, 2))
    torch.testing.assert_close(F.dist(Sphere(2.0), x, -x), torch.full((BATCH,), 2 * math.pi, dtype=torch.float64))
    line, _ = tangent(Grassmann(), (4, 1))
    assert float(F.dist("grassmann", line, -line).max()) == 0


@pytest.mark.parametrize(("of", "size"), CURVED, ids=ids)
def test_transp_is_tangent_at_the_end(of: Manifold, size: tuple[int, int]) -> None:
    x, v = tangent(of, size)
    y = F.retr(of, x, v)
    moved = F.transp(of, x, y, v)
    torch.testing.assert_close(F.proj(of, y, moved), moved, rtol=0, atol=100 * EPS)


@pytest.mark.parametrize(("of", "size"), CURVED, ids=ids)
def test_violation_measures_the_constraint(of: Manifold, size: tuple[int, int]) -> None:
    """On the manifold rounding, off it what numpy finds: spheres by their norm, Stiefel by its Gram matrix."""
    x = F.projx(of, ambient(size))
    assert float(F.violation(of, x).max()) < 10 * EPS
    grown = F.violation(of, 1.25 * x)
    expected = 1.25**2 - 1 if of.name == "stiefel" else 0.25
    torch.testing.assert_close(grown, torch.full_like(grown, expected))
    one = x.clone()
    one[2, 0, 0] += 1e-3 * scale(of)
    assert float(F.violation(of, one)[[0, 1, 3, 4, 5]].max()) < 10 * EPS
    assert float(F.violation(of, one)[2]) == pytest.approx(_violation(of, one[2].numpy()), rel=1e-9)


def _violation(of: Manifold, x: np.ndarray) -> float:
    if of.name == "stiefel":
        return float(np.abs(constraint(of, x)).max())
    return float(np.abs(np.sqrt(constraint(of, x) + 1) - 1).max())


@pytest.mark.parametrize(("of", "size"), [(Euclidean(), (3, 2)), (ScaleInvariant(), (4, 1))], ids=ids)
def test_violation_is_zero_without_a_constraint(of: Manifold, size: tuple[int, int]) -> None:
    assert F.violation(of, ambient(size)).tolist() == [0.0] * BATCH


@pytest.mark.parametrize(("of", "size", "name"), RETRACTIONS, ids=ids)
@pytest.mark.parametrize("length", [0.0, 0.7])
def test_retr_is_differentiable(of: Manifold, size: tuple[int, int], name: str, length: float) -> None:
    """At ``v = 0`` too, where all singular values agree and sin(t)/t is 0/0."""
    x, v = (t[:2] for t in tangent(of, size, length))

    def moved(direction: Tensor) -> Tensor:
        return F.retr(of, x, F.proj(of, x, direction), name)

    assert torch.autograd.gradcheck(moved, (v.clone().requires_grad_(),))


@pytest.mark.parametrize(("of", "size"), ALL, ids=ids)
def test_the_rest_is_differentiable(of: Manifold, size: tuple[int, int]) -> None:
    x, v = (t[:2].clone().requires_grad_() for t in tangent(of, size))
    y = F.projx(of, ambient(size))[:2].requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: F.proj(of, a, b), (x, v))
    assert torch.autograd.gradcheck(lambda a, b: F.egrad2rgrad(of, a, b), (x, v))
    assert torch.autograd.gradcheck(lambda a: F.projx(of, a), (x,))
    assert torch.autograd.gradcheck(lambda a, b: F.inner(of, a, b, b), (x, v))
    if of.name != "stiefel":
        assert torch.autograd.gradcheck(lambda a, b: F.dist(of, a, b), (x, y))


@pytest.mark.parametrize("size", [(5, 3), (3, 3), (2, 4)])
def test_polar_and_qr_are_differentiable(size: tuple[int, int]) -> None:
    x = ambient(size)[:2]
    for point in (x, F.projx("stiefel", x)):  # all singular values of the second agree
        assert torch.autograd.gradcheck(F.polar, (point.clone().requires_grad_(),))
        assert torch.autograd.gradcheck(lambda a: F.qr(a), (point.clone().requires_grad_(),))


def test_orthogonality_penalty() -> None:
    y = torch.randn(2, 4, 6, dtype=torch.float64)
    expected = [0.15 * np.linalg.norm(a @ a.T - np.eye(4)) ** 2 for a in y.numpy()]
    np.testing.assert_allclose(F.orthogonality_penalty(y, 0.3).numpy(), expected, rtol=1e-13)
    assert float(F.orthogonality_penalty(F.projx("stiefel", y), 1.0).max()) < 1e-28


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("of", "layout"),
    [
        (Sphere("fan"), Layout("kernel")),
        (Oblique(), Layout("matrix")),
        (Stiefel("fan"), Layout("kernel")),
        (Stiefel(0.5), Layout("matrix", out_dim=1)),
        (Grassmann(), Layout("filter")),
    ],
    ids=ids,
)
def test_project_weight(of: Manifold, layout: Layout, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 8, 3, 3).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    F.project_weight_(of, weight, layout)
    # Every element is rounded once, by eps/2 of itself: norms and elements of the Gram matrix change by at most eps.
    assert F.weight_violation(of, weight, layout) <= 1.01 * torch.finfo(dtype).eps + 20 * EPS
    assert weight.is_contiguous(memory_format=torch.channels_last)
    F.project_weight_(of, weight, layout, scale=3.0)
    assert F.weight_violation(of, weight, layout, scale=3.0) <= 1.01 * torch.finfo(dtype).eps + 20 * EPS


def test_fan_scale_keeps_the_norm_of_he_initialisation() -> None:
    weight = torch.randn(6, 8, 3, 3)
    for of in (Sphere("fan"), Stiefel("fan")):
        F.project_weight_(of, weight, Layout("kernel"))
        torch.testing.assert_close(weight.flatten(1).norm(dim=1), torch.full((6,), math.sqrt(2)))


def test_zero_weights_have_a_defined_projection() -> None:
    for of, expected in ((Sphere(2.0), [[2, 0], [0, 0]]), (Oblique(2.0), [[2, 2], [0, 0]])):
        weight = torch.zeros(3, 1, 2, 2)
        F.project_weight_(of, weight, Layout("kernel"))
        assert weight[1, 0].tolist() == expected
    half = torch.tensor([[0.0, 3.0], [0.0, 4.0]])
    F.project_weight_("oblique", half, Layout("matrix", out_dim=1))
    torch.testing.assert_close(half, torch.tensor([[1.0, 0.6], [0.0, 0.8]]))
    frame = torch.zeros(2, 2, 3, 3)
    F.project_weight_("stiefel", frame, Layout("kernel"))
    assert F.weight_violation("stiefel", frame, Layout("kernel")) < 1e-6
    assert F.weight_violation("stiefel", torch.zeros(0, 2, 3, 3), Layout("kernel")) == 0.0


def test_extreme_numbers_project() -> None:
    for size in (1e-30, 1e30):
        x = size * torch.randn(4, 3, 2)
        for name in ("sphere", "oblique"):
            assert float(F.violation(name, F.projx(name, x)).max()) < 1e-6


def test_errors_name_the_argument() -> None:
    x = torch.randn(2, 3, 3)
    with pytest.raises(ValueError, match=r"fan.*scale_of"):
        F.proj(Sphere("fan"), x, x)
    with pytest.raises(ValueError, match=r"v: wanted \(2, 3, 3\)"):
        F.proj("sphere", x, x[0])
    with pytest.raises(ValueError, match=r"egrad: .*float64"):
        F.egrad2rgrad("sphere", x, x.double())
    with pytest.raises(ValueError, match=r"x: wanted matrices"):
        F.projx("sphere", x[0, 0])
    with pytest.raises(TypeError, match=r"x: wanted float32 or float64.*\.float\(\)"):
        F.projx("sphere", x.half())
    with pytest.raises(ValueError, match="retraction: wanted one of"):
        F.retr("sphere", x, x, "qr")
    with pytest.raises(ValueError, match="manifold: wanted"):
        F.projx("torus", x)
    with pytest.raises(NotImplementedError, match="dist: stiefel"):
        F.dist("stiefel", x, x)
    with pytest.raises(NotImplementedError, match="expmap: scale_invariant"):
        F.expmap("scale_invariant", x, x)
    with pytest.raises(ValueError, match=r"wanted vectors \(\.\.\., n, 1\)"):
        F.projx("grassmann", x)
    with pytest.raises(ValueError, match="weight: wanted finite"):
        F.project_weight_("stiefel", torch.full((2, 2), math.nan), Layout("matrix"))
    with pytest.raises(TypeError, match="weight: wanted a floating-point"):
        F.weight_violation("sphere", torch.ones(2, 2, dtype=torch.int64), Layout("matrix"))
    with pytest.raises(ValueError, match="scale: wanted"):
        F.project_weight_("sphere", torch.ones(2, 2), Layout("matrix"), scale=-1.0)
