"""[PSI] Theorem 1 and Lemma 1 on a batch-normalised network: training does not feel the scale of its weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from manifold_kernels import PSISGD, ops, param_groups

BACKENDS = [name for name, missing in ops.backends().items() if missing is None]
STEPS, BATCH = 100, 32


def network() -> nn.Module:
    # An eps that is negligible beside the smallest variance here: with torch's default the network feels its scale.
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6, eps=1e-30),
        nn.ELU(),
        nn.Conv2d(6, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8, eps=1e-30),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(8 * 3 * 3, 12, bias=False),
        nn.BatchNorm1d(12, eps=1e-30),
        nn.ELU(),
        nn.Linear(12, 10),
    )
    return model.double()


def rows(model: nn.Module) -> list[Tensor]:
    """The scale-invariant weights, a row for each neuron."""
    return [model.get_submodule(name).weight.detach().flatten(1) for name in ("0", "3", "7")]  # type: ignore[union-attr, operator]


def train(model: nn.Module, backend: str, guard: float) -> tuple[list[Tensor], list[float]]:
    """The rows after :data:`STEPS` steps of PSI-SGDM on real digits, and the losses on the way."""
    images, labels = load_digits(return_X_y=True)
    data = torch.tensor(images / 16, dtype=torch.float64).reshape(-1, 1, 8, 8)
    target = torch.tensor(labels)
    optimizer = PSISGD(param_groups(model, "scale_invariant"), lr=0.02, momentum=0.9, guard=guard, backend=backend)
    losses = []
    for step in range(STEPS):
        batch = slice(step * BATCH % 1600, step * BATCH % 1600 + BATCH)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(data[batch]), target[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return rows(model), losses


def scaled(model: nn.Module, alpha: Tensor) -> nn.Module:
    """A copy with every scale-invariant row multiplied by a factor of its own, drawn from ``alpha``."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for weight in rows(other):
        weight.mul_(alpha[torch.randint(len(alpha), (len(weight), 1), generator=generator)])
    return other


def distance(some: list[Tensor], others: list[Tensor]) -> float:
    """The largest distance of two rows' directions."""
    unit = nn.functional.normalize
    return max(float((unit(a) - unit(b)).norm(dim=1).max()) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_powers_of_two_change_no_bit(backend: str) -> None:
    model = network()
    alpha = 2.0 ** torch.arange(-13, 14, dtype=torch.float64)  # 1e-4 to 1e4
    weights, losses = train(copy.deepcopy(model), backend, math.inf)
    same_weights, same_losses = train(scaled(model, alpha), backend, math.inf)
    assert losses[-1] < 0.7 * losses[0]  # it has learnt, or the theorem would be about nothing
    assert same_losses == losses
    factors = [there / here for here, there in zip(weights, same_weights, strict=True)]
    for factor in factors:
        assert bool((factor == factor[:, :1]).all()) and bool(torch.isin(factor[:, 0], alpha).all())
    assert torch.cat([factor[:, 0] for factor in factors]).unique().numel() > 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("guard", [math.inf, 1e4])
def test_equivalent_starts_stay_equivalent(backend: str, guard: float) -> None:
    model = network()
    alpha = torch.logspace(-4, 4, 17, dtype=torch.float64)
    weights, losses = train(copy.deepcopy(model), backend, guard)
    others, other_losses = train(scaled(model, alpha), backend, guard)
    # Scaling rounds every weight once, by half a unit at most, and so does every step. How far 100 steps carry such a
    # difference depends on the network: measured by a start that is off by 2^-20, and linear while it stays small.
    offset = 2.0**-20
    nearby = copy.deepcopy(model)
    for weight in rows(nearby):
        weight.mul_(
            1 + offset * torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(2))
        )
    growth = distance(train(nearby, backend, guard)[0], weights) / offset
    # A rounding of 2^-53 in each of the steps, with a factor of 8 for the several operations of a step.
    bound = 8 * STEPS * growth * 2.0**-53
    assert growth * offset < 1e-2
    assert distance(others, weights) <= bound < 1e-9
    assert max(abs(a - b) for a, b in zip(losses, other_losses, strict=True)) <= 100 * bound


def test_the_network_is_scale_invariant() -> None:
    """[PSI] Lemma 1: the gradient is orthogonal to every row, and plain SGD never shortens one."""
    model = network()
    images, labels = load_digits(return_X_y=True)
    data = torch.tensor(images[:64] / 16, dtype=torch.float64).reshape(-1, 1, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        before = [weight.norm(dim=1) for weight in rows(model)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data), torch.tensor(labels[:64])).backward()
        for name, weight in zip(("0", "3", "7"), rows(model), strict=True):
            grad = model.get_submodule(name).weight.grad.flatten(1)  # type: ignore[union-attr, operator]
            inner = (weight * grad).sum(1).abs()
            assert bool((inner <= 1e-12 * weight.norm(dim=1) * grad.norm(dim=1)).all())
        optimizer.step()
        for old, weight in zip(before, rows(model), strict=True):
            assert bool((weight.norm(dim=1) >= old * (1 - 1e-15)).all())
