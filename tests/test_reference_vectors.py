"""PSI-SGD, SGD-G and Adam-G steps of the reference: their theorems, and numpy derivations one vector at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from stepping import Run, group, place_, run_steps
from torch import Tensor

from manifold_kernels import functional as F
from manifold_kernels.manifolds import Grassmann, ScaleInvariant
from manifold_kernels.reference import step_
from manifold_kernels.views import Layout

FILTER = Layout("filter")
EPS = torch.finfo(torch.float64).eps


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def invariant(shape: tuple[int, ...]) -> tuple[Callable[[Tensor], Tensor], Callable[[list[Tensor]], list[Tensor]]]:
    """A smooth function of the directions of the rows, and its gradient for ``run_steps``."""
    a, b = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        rows = w / w.flatten(1).norm(dim=1).reshape(-1, *[1] * (w.dim() - 1))
        return (a * rows + torch.sin(2 * b * rows)).sum()

    def gradient(params: list[Tensor]) -> list[Tensor]:
        w = params[0].detach().clone().requires_grad_()
        return list(torch.autograd.grad(loss(w), w))

    return loss, gradient


def scaled(run: Run, alpha: Tensor) -> Run:
    """The state that ``T_alpha`` makes of a run: weights and momenta of row d times ``alpha[d]``."""
    return Run(
        [alpha * run.params[0]],
        [alpha * run.momenta[0] if run.momenta[0].numel() else run.momenta[0].clone()],
        [run.variances[0].clone()],
        run.steps.clone(),
        run.nonfinite.clone(),
    )


def psi_run(w: Tensor | Run, gradient: Callable[[list[Tensor]], list[Tensor]], count: int, **hyper: float) -> Run:
    start = w if isinstance(w, Run) else [w]
    return run_steps(step_, start, gradient, [group(ScaleInvariant())], [hyper], count=count)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_theorem_1_is_exact_for_powers_of_two(momentum: float, decay: float) -> None:
    """[PSI] Theorem 1: rows scaled by any alpha > 0, each its own, move as the others do, times alpha.

    Every operation commutes with a power of two (no overflow is near), so nothing is rounded differently. Weight
    decay through the gradient is not invariant: its coefficient has to shrink as alpha^-2, for all rows at once.
    """
    w = torch.randn(4, 3, 2, 3, dtype=torch.float64)
    _, gradient = invariant((4, 3, 2, 3))
    hyper = {"lr": 0.05, "momentum": momentum, "guard": math.inf}
    alpha = torch.tensor([2.0**-13, 0.5, 4.0, 2.0**13], dtype=torch.float64) if not decay else torch.full((4,), 8.0)
    alpha = alpha.double().reshape(4, 1, 1, 1)
    begun = psi_run(w, gradient, 3, weight_decay=decay, **hyper)
    other = scaled(begun, alpha)
    plain = psi_run(begun, gradient, 20, weight_decay=decay, **hyper)
    run = psi_run(other, gradient, 20, weight_decay=decay / 64, **hyper)
    assert torch.equal(run.params[0], alpha * plain.params[0])
    if momentum:
        assert torch.equal(run.momenta[0], alpha * plain.momenta[0])
    assert float((plain.params[0] - w).norm()) > 0.1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("alpha", [1e-4, 3.7, 1e4])
def test_theorem_1_for_any_scale(alpha: float, momentum: float) -> None:
    w = torch.randn(4, 18, dtype=torch.float64)
    _, gradient = invariant((4, 18))
    hyper = {"lr": 0.02, "momentum": momentum, "guard": math.inf}
    plain = psi_run(w, gradient, 20, **hyper)
    run = psi_run(alpha * w, gradient, 20, **hyper)
    # A step rounds some 100 times (sums of 18, sine) and amplifies what it was given by 1 + lr |Hessian|/(1 - rho),
    # below 1.5 here: 20 * 100 eps * 1.5^20 = 1.5e-9 for the worst alignment of all.
    torch.testing.assert_close(run.params[0], alpha * plain.params[0], rtol=0, atol=2e-9 * alpha)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_guard_scales_weight_and_momentum(momentum: float) -> None:
    """After it has fired the directions and the loss still go on as without it ([PSI] section 6.2, corrected)."""
    w = torch.randn(4, 6, dtype=torch.float64)
    loss, gradient = invariant((4, 6))
    hyper = {"lr": 0.05, "momentum": momentum}
    free = psi_run(3e4 * w, gradient, 1, guard=math.inf, **hyper)
    held = psi_run(3e4 * w, gradient, 1, guard=1e4, **hyper)
    lengths = free.params[0].norm(dim=1, keepdim=True)
    torch.testing.assert_close(held.params[0], free.params[0] / lengths, rtol=0, atol=4 * EPS)
    if momentum:
        torch.testing.assert_close(held.momenta[0], free.momenta[0] / lengths, rtol=4 * EPS, atol=4 * EPS)
    free, held = psi_run(free, gradient, 20, guard=math.inf, **hyper), psi_run(held, gradient, 20, guard=1e4, **hyper)
    rows = [run.params[0] / run.params[0].norm(dim=1, keepdim=True) for run in (free, held)]
    torch.testing.assert_close(rows[0], rows[1], rtol=0, atol=2e-9)  # as for any scale, above
    assert float(loss(free.params[0])) == pytest.approx(float(loss(held.params[0])), rel=1e-8)


def test_the_guard_waits_for_its_norm() -> None:
    w = torch.tensor([[3.0, 4.0], [6.0, 8.0]], dtype=torch.float64)
    run = run_steps(step_, [w], [[torch.zeros_like(w)]], [group(ScaleInvariant())], [{"guard": 5.0}])
    torch.testing.assert_close(run.params[0], torch.tensor([[3.0, 4.0], [0.6, 0.8]], dtype=torch.float64))


def test_lemma_1_rows_grow_by_pythagoras() -> None:
    """``<w, g> = 0`` for a scale-invariant loss: ``||w + u||^2 = ||w||^2 + ||u||^2``, ``||u|| = lr ||w||^2 ||g||``."""
    w = torch.randn(4, 6, dtype=torch.float64)
    _, gradient = invariant((4, 6))
    g = gradient([w])[0]
    assert float((w * g).sum(1).abs().max()) < 50 * EPS
    run = psi_run(w, gradient, 1, lr=0.3)
    square, steps = (w * w).sum(1), (g * g).sum(1)
    torch.testing.assert_close((run.params[0] ** 2).sum(1), square + 0.09 * square**2 * steps, rtol=1e-13, atol=0)


def test_psi_decay_by_hand() -> None:
    """k = lr lambda ||w||^2 = 0.1 * 0.01 * 25, and no more than a half for long rows."""
    w = torch.tensor([[3.0, 4.0], [300.0, 400.0]], dtype=torch.float64)
    hyper = [{"lr": 0.1, "weight_decay": 0.01, "momentum": 0.9}]
    run = run_steps(step_, [w], [[torch.zeros_like(w)]], [group(ScaleInvariant())], hyper)
    expected = torch.tensor([[2.925, 3.9], [150.0, 200.0]], dtype=torch.float64)
    torch.testing.assert_close(run.params[0], expected, rtol=1e-15, atol=0)
    assert float(run.momenta[0].abs().max()) == 0


def test_psi_decay_is_decay_through_the_gradient() -> None:
    """Without momentum: ``w - lr ||w||^2 (g + lambda w)``."""
    w, g = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    decayed = run_steps(step_, [w], [[g]], [group(ScaleInvariant())], [{"lr": 0.02, "weight_decay": 0.03}])
    through = run_steps(step_, [w], [[g + 0.03 * w]], [group(ScaleInvariant())], [{"lr": 0.02}])
    torch.testing.assert_close(decayed.params[0], through.params[0], rtol=0, atol=10 * EPS)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_psi_against_numpy(momentum: float) -> None:
    """[PSI] Eq. 11 (corrected), row by row; one component may own several rows, as behind a group norm."""
    w = torch.randn(6, 2, 2, 2, dtype=torch.float64)
    grads = [torch.randn_like(w) for _ in range(4)]
    layout = Layout("filter", rows=3)
    hyper = {"lr": 0.03, "momentum": momentum, "maximize": 1.0}
    run = run_steps(step_, [w], [[g] for g in grads], [group(ScaleInvariant(), layout)], [hyper], fill=math.nan)
    for part in (slice(0, 3), slice(3, 6)):
        x, u = w[part].numpy().ravel(), np.zeros(24)
        for g in grads:
            u = momentum * u + 0.03 * (x @ x) * g[part].numpy().ravel()
            x = x + u
        np.testing.assert_allclose(run.params[0][part].numpy().ravel(), x, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("guard", [1e4, math.inf])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_psi_weights_stay_finite(momentum: float, guard: float, dtype: torch.dtype) -> None:
    """Where the momentum or the weight cannot be stored, the component stays and is counted."""
    w = torch.randn(4, 6).to(dtype)
    grads = [[(w.sign().double() * torch.finfo(dtype).max * size).to(dtype)] for size in (1.0, 1e-2)]
    run = run_steps(step_, [w], grads, [group(ScaleInvariant())], [{"lr": 1.0, "momentum": momentum, "guard": guard}])
    assert bool(run.params[0].isfinite().all())
    assert not momentum or bool(run.momenta[0].isfinite().all())
    if guard == math.inf:
        assert run.nonfinite.tolist() != [0]


def test_the_stored_u_is_what_is_stepped_along() -> None:
    w = torch.randn(4, 6).bfloat16()
    grads = [torch.randn_like(w) for _ in range(2)]
    rows, hyper = [group(ScaleInvariant())], [{"momentum": 0.9}]
    once = run_steps(step_, [w], [[grads[0]]], rows, hyper)
    twice = run_steps(step_, [w], [[g] for g in grads], rows, hyper)
    assert torch.equal(twice.params[0], (once.params[0].double() + twice.momenta[0].double()).bfloat16())


def transported(w: np.ndarray, d: np.ndarray) -> np.ndarray:
    """The rotation that carries w, and every tangent vector in parallel, along the geodesic of the tangent d."""
    return scipy.linalg.expm(np.outer(d, w) - np.outer(w, d))


def clipped(w: np.ndarray, g: np.ndarray, limit: float) -> np.ndarray:
    h = (np.eye(len(w)) - np.outer(w, w)) @ g
    return h * min(1.0, limit / np.linalg.norm(h))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_g_against_rotations(momentum: float) -> None:
    w = place_(Grassmann(), torch.randn(3, 5, dtype=torch.float64), FILTER)
    # Some gradients are clipped and some are not; lr 2 makes steps of up to a radian.
    grads = [torch.randn_like(w) * size for size in (0.02, 3.0, 0.05, 1e5)]
    hyper = {"lr": 2.0, "momentum": momentum}
    run = run_steps(step_, [w], [[g] for g in grads], [group(Grassmann())], [hyper], fill=math.nan)
    for row in range(3):
        x, tau = w[row].numpy(), np.zeros(5)
        for g in grads:
            d = momentum * tau - 2.0 * clipped(x, g[row].numpy(), 0.1)
            rotation = transported(x, d)
            x, tau = rotation @ x, rotation @ d
        # Four steps of a few dozen roundings each, those of the matrix exponential above all.
        np.testing.assert_allclose(run.params[0][row].numpy(), x, rtol=0, atol=200 * EPS)
        if momentum:
            np.testing.assert_allclose(run.momenta[0][row].numpy(), tau, rtol=0, atol=200 * EPS)
    assert momentum or run.momenta[0].numel() == 0


def test_adam_g_against_rotations() -> None:
    w = place_(Grassmann(), torch.randn(3, 5, dtype=torch.float64), FILTER)
    grads = [torch.randn_like(w) * size for size in (0.02, 3.0, 0.05, 1e5)]
    lr, beta1, beta2, eps, limit = 0.3, 0.8, 0.95, 1e-4, 0.2
    hyper = {"lr": lr, "momentum": beta1, "beta2": beta2, "eps": eps, "clip": limit, "maximize": 1.0}
    rows = [group(Grassmann(), rule="adam_g")]
    run = run_steps(step_, [w], [[g] for g in grads], rows, [hyper], fill=math.nan)
    for row in range(3):
        x, tau, v = w[row].numpy(), np.zeros(5), 0.0
        for t, g in enumerate(grads, 1):
            h = clipped(x, -g[row].numpy(), limit)
            m = beta1 * tau + (1 - beta1) * h
            v = beta2 * v + (1 - beta2) * float(h @ h)
            corrected, second = m / (1 - beta1**t), v / (1 - beta2**t)
            d = -lr * corrected / math.sqrt(second + eps / (1 - beta2**t))
            rotation = transported(x, d)
            x, tau = rotation @ x, rotation @ m
        np.testing.assert_allclose(run.params[0][row].numpy(), x, rtol=0, atol=200 * EPS)
        np.testing.assert_allclose(run.momenta[0][row].numpy(), tau, rtol=0, atol=200 * EPS)
        assert float(run.variances[0][row]) == pytest.approx(v, rel=1e-12)


@pytest.mark.parametrize(
    ("rule", "length"),
    [("sgd_g", 0.5 * 0.1), ("adam_g", 0.5 / math.sqrt(1 + 1e-8 / (0.01 * 0.1**2)))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_huge_first_gradient_takes_the_clipped_step(rule: str, length: float, dtype: torch.dtype) -> None:
    """SGD-G walks lr nu, Adam-G lr nu/sqrt(nu^2 + eps/(1 - beta_2)), along the projected gradient."""
    w = place_(Grassmann(), torch.randn(4, 9, dtype=dtype), FILTER)
    g = torch.randn_like(w) * (1e30 if dtype == torch.float32 else 1e300)
    run = run_steps(step_, [w], [[g]], [group(Grassmann(), rule=rule)], [{"lr": 0.5, "momentum": 0.9}])
    walked = F.dist("grassmann", w.double()[..., None], run.params[0].double()[..., None])
    # Points are rounded to eps/2 an element, in sum below eps.
    torch.testing.assert_close(walked, torch.full_like(walked, length), rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["sgd_g", "adam_g"])
def test_unit_norm_and_tangent_momentum_for_long(rule: str, dtype: torch.dtype) -> None:
    w = place_(Grassmann(), torch.randn(8, 3, 3, 3).to(dtype), FILTER)
    rows, hyper = [group(Grassmann(), rule=rule)], [{"lr": 0.2, "momentum": 0.9}]
    grads = [[torch.randn(8, 3, 3, 3).to(dtype)] for _ in range(200)]
    run = run_steps(step_, [w], grads, rows, hyper)
    eps = torch.finfo(dtype).eps
    assert F.weight_violation("grassmann", run.params[0], FILTER) <= 0.51 * eps + 4 * EPS
    x, tau = run.params[0].double().flatten(1), run.momenta[0].double().flatten(1)
    # Each of the two vectors is rounded by at most eps/2 of its norm.
    assert float(((x * tau).sum(1).abs() / tau.norm(dim=1)).max()) <= 1.01 * eps + 4 * EPS
    assert run.variances[0].dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("rule", ["sgd_g", "adam_g"])
def test_what_rounding_adds_is_removed(rule: str) -> None:
    """A weight off the unit sphere steps as the normalised one, and momentum along the weight is gone after a step."""
    w = place_(Grassmann(), torch.randn(4, 9, dtype=torch.float64), FILTER)
    grads = [[torch.randn_like(w)] for _ in range(2)]
    rows, hyper = [group(Grassmann(), rule=rule)], [{"lr": 0.5, "momentum": 0.9}]
    on = run_steps(step_, [w], grads, rows, hyper)
    off = run_steps(step_, [1.25 * w], grads, rows, hyper)
    torch.testing.assert_close(off.params[0], on.params[0], rtol=0, atol=20 * EPS)
    off.momenta[0] += 0.3 * off.params[0]
    run_steps(step_, off, [[torch.randn_like(w)]], rows, hyper)
    assert float((off.params[0] * off.momenta[0]).sum(1).abs().max()) < 4 * EPS


@pytest.mark.parametrize("rule", ["sgd_g", "adam_g"])
def test_zero_gradients_leave_points(rule: str) -> None:
    """0/0 and sin(0)/0 are defined."""
    w = place_(Grassmann(), torch.randn(4, 9), FILTER)
    run = run_steps(step_, [w], [[torch.zeros_like(w)]] * 2, [group(Grassmann(), rule=rule)], [{"momentum": 0.9}])
    torch.testing.assert_close(run.params[0], w, rtol=0, atol=2 * torch.finfo(torch.float32).eps)
    assert float(run.momenta[0].abs().max()) == 0


@pytest.mark.parametrize("rule", ["psi_sgd", "sgd_g", "adam_g"])
def test_non_finite_gradients_leave_their_row(rule: str) -> None:
    of = ScaleInvariant() if rule == "psi_sgd" else Grassmann()
    w = place_(of, torch.randn(4, 9), FILTER)
    good, bad = torch.randn_like(w), torch.randn_like(w)
    bad[2, 5] = math.nan
    rows, hyper = [group(of, rule=rule)], [{"momentum": 0.9}]
    once = run_steps(step_, [w], [[good]], rows, hyper)
    run = run_steps(step_, [w], [[good], [bad]], rows, hyper)
    fixed = run_steps(step_, [w], [[good], [bad.nan_to_num()]], rows, hyper)
    states = [lambda r: r.params[0], lambda r: r.momenta[0]]
    if rule == "adam_g":
        states.append(lambda r: r.variances[0])
    for state in states:
        assert torch.equal(state(run)[2], state(once)[2])
        assert torch.equal(state(run)[[0, 1, 3]], state(fixed)[[0, 1, 3]])
        assert not torch.equal(state(fixed)[2], state(once)[2])
    assert run.nonfinite.tolist() == [1]
