"""The learning-rate schedule of [FG] Eq. 4: its sums, torch's contract, and what it is for."""

from __future__ import annotations

import io
import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.integrate
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, LinearLR, LRScheduler, SequentialLR

from manifold_kernels import FGSGD
from manifold_kernels import functional as F
from manifold_kernels.manifolds import Sphere
from manifold_kernels.optim.schedule import RobbinsMonroLR

EPS = torch.finfo(torch.float64).eps


def sgd(*rates: float | Tensor) -> SGD:
    """An optimizer with a param group for every rate."""
    return SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def rates(scheduler: LRScheduler, count: int, group: int = 0) -> list[float]:
    """The rates of ``count`` steps."""
    optimizer = scheduler.optimizer
    seen = []
    for _ in range(count):
        seen.append(float(optimizer.param_groups[group]["lr"]))
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("alpha", [0.51, 0.75, 1.0])
@pytest.mark.parametrize("t0", [0.3, 10.0, 200.0])
def test_sums_lie_between_their_integrals(alpha: float, t0: float) -> None:
    """A falling function's sum over [0, T) lies between its integral and that plus its first value."""
    count = 3000
    seen = np.array(rates(RobbinsMonroLR(sgd(0.7), t0, alpha), count))
    for power in (1, 2):
        total = float((seen**power).sum())
        integral = scipy.integrate.quad(lambda t, q=alpha * power: (1 + t / t0) ** -q, 0, count, limit=200)[0]
        # Rates round a few times in each of 3000 calls, and quad is content with 1.5e-8.
        assert 0.7**power * integral * (1 - 1e-7) <= total <= 0.7**power * (integral + 1) * (1 + 1e-7)


@pytest.mark.parametrize("alpha", [0.51, 0.75, 1.0])
def test_the_rates_sum_to_infinity_and_their_squares_do_not(alpha: float) -> None:
    """[FG] Eq. 4 by Cauchy's condensation: what the steps of [2^k - 1, 2^(k+1) - 1) contribute, for t0 = 1."""
    seen = np.array(rates(RobbinsMonroLR(sgd(0.5), 1.0, alpha), 2**14 - 1))
    blocks = [seen[2**k - 1 : 2 ** (k + 1) - 1] for k in range(14)]
    # The rate at t is 0.5/(1 + t)^alpha, in block k above 0.5/2^(k+1): 2^k of them sum to 1/4 at least, for ever.
    assert min(float(block.sum()) for block in blocks) >= 0.25
    # Block k + 1 has for every rate of block k two that are smaller by 2^alpha or more: its squares sum to less by
    # 2^(1 - 2 alpha) < 1, a geometric series. (Rounding: three products in each of 2^14 calls.)
    squares = [float((block**2).sum()) for block in blocks]
    assert all(later <= 2 ** (1 - 2 * alpha) * block * (1 + 2**16 * EPS) for block, later in pairwise(squares))


def test_every_group_starts_from_its_own_rate() -> None:
    optimizer = sgd(0.8, 0.05)
    scheduler = RobbinsMonroLR(optimizer, t0=4.0)
    assert scheduler.get_last_lr() == [0.8, 0.05]
    rates(scheduler, 12)
    assert scheduler.get_last_lr() == pytest.approx([0.2, 0.0125], rel=1e-14)  # 1 + 12/4 = 4


def test_a_long_run_stays_with_the_formula() -> None:
    scheduler = RobbinsMonroLR(sgd(0.3), t0=7.0, alpha=0.6)
    rates(scheduler, 20000)
    # Three roundings a call.
    assert scheduler.get_last_lr()[0] == pytest.approx(0.3 / (1 + 20000 / 7) ** 0.6, rel=3 * 20000 * EPS)


def test_a_rate_in_a_tensor_is_changed_in_place() -> None:
    rate = torch.tensor(0.8, dtype=torch.float64)
    optimizer = FGSGD([nn.Parameter(torch.zeros(1))], lr=rate)
    seen = rates(RobbinsMonroLR(optimizer, t0=1.0), 4)
    assert seen == pytest.approx([0.8, 0.4, 0.8 / 3, 0.2], rel=1e-14)
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(0.16, rel=1e-14)


def test_behind_a_warm_up() -> None:
    optimizer = sgd(0.6)
    parts = [LinearLR(optimizer, start_factor=0.5, total_iters=2), RobbinsMonroLR(optimizer, t0=1.0)]
    seen = rates(SequentialLR(optimizer, parts, milestones=[2]), 6)
    assert seen == pytest.approx([0.3, 0.45, 0.6, 0.3, 0.2, 0.15], rel=1e-14)


def test_before_another_schedule() -> None:
    optimizer = sgd(0.6)
    parts = [RobbinsMonroLR(optimizer, t0=1.0), ConstantLR(optimizer, factor=0.5, total_iters=9)]
    seen = rates(SequentialLR(optimizer, parts, milestones=[3]), 5)
    assert seen == pytest.approx([0.6, 0.3, 0.2, 0.3, 0.3], rel=1e-14)


@pytest.mark.parametrize("first", [True, False])
def test_chained_with_a_factor(first: bool) -> None:
    """Chained schedules multiply, whatever their order."""
    optimizer = sgd(0.6)
    parts = [RobbinsMonroLR(optimizer, t0=1.0), ConstantLR(optimizer, factor=0.5, total_iters=3)]
    seen = rates(ChainedScheduler(parts if first else parts[::-1], optimizer), 6)
    assert seen == pytest.approx([0.3, 0.15, 0.1, 0.15, 0.12, 0.1], rel=1e-14)


def test_resumes_from_a_file() -> None:
    optimizer = sgd(0.9, 0.1)
    scheduler = RobbinsMonroLR(optimizer, t0=5.0, alpha=0.8)
    rates(scheduler, 7)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    again = sgd(0.5, 0.5)
    resumed = RobbinsMonroLR(again, t0=1.0)
    again.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["scheduler"])
    assert resumed.get_last_lr() == scheduler.get_last_lr()
    for group in range(2):
        assert rates(resumed, 9, group) == rates(scheduler, 9, group)


def test_resumes_from_last_epoch() -> None:
    """As torch's schedulers: the constructor takes one call back and leaves the rates alone."""
    optimizer = sgd(0.9)
    scheduler = RobbinsMonroLR(optimizer, t0=5.0)
    rates(scheduler, 7)
    again = sgd(0.9)
    again.load_state_dict(optimizer.state_dict())
    assert rates(RobbinsMonroLR(again, t0=5.0, last_epoch=6), 9) == rates(scheduler, 9)


def test_jumps_to_an_epoch() -> None:
    scheduler = RobbinsMonroLR(sgd(0.9), t0=5.0)
    scheduler.optimizer.step()
    with pytest.warns(UserWarning, match="epoch parameter"):
        scheduler.step(10)
    assert scheduler.get_last_lr() == pytest.approx([0.3], rel=1e-14)


@pytest.mark.parametrize(
    ("t0", "alpha", "message"),
    [
        (0.0, 1.0, "t0: wanted a finite number > 0"),
        (math.inf, 1.0, "t0: wanted a finite number > 0"),
        (math.nan, 1.0, "t0: wanted a finite number > 0"),
        (1.0, 0.5, r"alpha: wanted a number in \(1/2, 1\], got 0.5.*the noise stays"),
        (1.0, 1.01, r"alpha: wanted a number in \(1/2, 1\], got 1.01.*stop on their way"),
        (1.0, math.nan, "alpha: wanted a number in .*got nan"),
    ],
)
def test_rates_that_violate_the_condition_are_refused(t0: float, alpha: float, message: str) -> None:
    optimizer = sgd(0.1)
    with pytest.raises(ValueError, match=message):
        RobbinsMonroLR(optimizer, t0, alpha)
    assert optimizer.param_groups[0]["lr"] == 0.1 and "initial_lr" not in optimizer.param_groups[0]


STEPS, NOISE = 2000, 0.05


def test_a_noisy_quadratic() -> None:
    """Minimise ``|x|^2/2`` by gradients ``x + noise``, from ones, in a thousand dimensions."""

    def train(scheduled: bool) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = nn.Parameter(torch.ones(1000, dtype=torch.float64))
        optimizer = SGD([x], lr=0.5)
        scheduler = RobbinsMonroLR(optimizer, t0=2.0)
        noises = torch.zeros_like(x)
        for _ in range(STEPS):
            noise = NOISE * torch.randn(x.shape, generator=generator, dtype=x.dtype)
            x.grad = x.detach() + noise
            noises += noise
            optimizer.step()
            if scheduled:
                scheduler.step()
        return x.detach(), noises

    # The rate is 1/(t + 2), and (t + 2) x_{t+1} = (t + 1) x_t - noise_t: all noises have the same weight in the end.
    # Rounding moves x by less than eps in a step: the rate is off by 3 t eps of itself at most, and a step is about
    # NOISE/t long.
    x, noises = train(scheduled=True)
    torch.testing.assert_close(x, (1 - noises) / (STEPS + 1), rtol=0, atol=STEPS * EPS)
    # Independent noises: squares of mean NOISE^2/STEPS, and a mean of a thousand of them within 6 of its deviations.
    within = 6 * math.sqrt(2 / 1000)
    assert float(x.square().mean()) <= (1 + within) * NOISE**2 / STEPS
    # A constant rate r forgets: the variance v = (1 - r)^2 v + r^2 NOISE^2 stays, which is NOISE^2/3.
    stalled, _ = train(scheduled=False)
    assert float(stalled.square().mean()) >= (1 - within) * NOISE**2 / 3


def test_noisy_leading_eigenvectors() -> None:
    """FG-SGD on 64 spheres at once: the leading eigenvector of ``e e^T`` from gradients with noise, 45 degrees away."""
    n, count, rate = 17, 64, 0.2

    def train(scheduled: bool) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        w = nn.Parameter(torch.zeros(count, n, dtype=torch.float64))
        w.data[:, :2] = math.sqrt(0.5)
        optimizer = FGSGD([w], lr=rate, manifold=Sphere(), view="filter", grouping="individual")
        scheduler = RobbinsMonroLR(optimizer, t0=2 / rate)
        goal = torch.eye(n, dtype=torch.float64)[:1]
        for _ in range(STEPS):
            w.grad = -w.detach() @ goal.T @ goal + NOISE * torch.randn(w.shape, generator=generator, dtype=w.dtype)
            optimizer.step()
            if scheduled:
                scheduler.step()
        assert optimizer.violation() < 4 * EPS
        return F.dist("sphere", w.detach()[..., None], goal.expand(count, n)[..., None]).square().mean()

    # Near the goal the n - 1 coordinates y of a row move by y <- (1 - r) y - r noise, the quadratic of above, up to
    # terms of third order in y; R is about 0.2, so that tau = max(1, R (2 + R)) = 1. With r = 2/(t + 10) and large t,
    # E[y^2] = v/t solves v/t - v/t^2 = (1 - 4/t) v/t + 4/t^2 NOISE^2: v = 4/3 NOISE^2. The way from 45 degrees is
    # forgotten as t^-4. A mean of 64 * 16 squares lies within 6 of its deviations, and 5 % are ample for the third
    # order.
    within = 6 * math.sqrt(2 / (count * (n - 1))) + 0.05
    variance = (n - 1) * NOISE**2
    assert float(train(scheduled=True)) <= (1 + within) * 4 / 3 * variance / STEPS
    # The constant rate stays at r/(2 - r), 170 times as far in squares.
    assert float(train(scheduled=False)) >= (1 - within) * rate / (2 - rate) * variance
