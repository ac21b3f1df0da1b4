"""One training of the demo: epochs, errors, times and how well the constraints hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from manifold_kernels.demo.data import Images
from manifold_kernels.demo.methods import Method
from manifold_kernels.demo.network import ResNet
from manifold_kernels.optim import FGSGD

BATCH = 128

#: The learning rate falls to a fifth at these parts of the epochs ([PSI] section 6.2).
MILESTONES = (0.3, 0.6, 0.8)


@dataclass
class Run:
    """What became of one training.

    Attributes:
        method: its name.
        losses: mean training loss of every epoch.
        errors: test error in % after every epoch.
        seconds: time of every epoch's training.
        violation: the largest relative violation of a constraint at the end, ``None`` where nothing is constrained.
    """

    method: str
    losses: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    violation: float | None = None


def train(
    method: Method,
    images: Images,
    *,
    epochs: int,
    blocks: int = 3,
    width: int = 8,
    seed: int = 0,
    after_batch: Callable[[Run], None] = lambda run: None,
) -> Run:
    """Train a new network; every method sees the same initial weights and the same batches."""
    torch.manual_seed(seed)
    model = ResNet(blocks, width)
    optimizer = method.optimizer(model)
    milestones = sorted({round(part * epochs) for part in MILESTONES})
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.2)
    shuffle = torch.Generator().manual_seed(seed)
    run = Run(method.name)
    for _ in range(epochs):
        start = time.perf_counter()
        model.train()
        losses = []
        for batch in torch.randperm(len(images.train_labels), generator=shuffle).split(BATCH):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            loss = cross_entropy(model(images.train_images[batch]), images.train_labels[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
            after_batch(run)
        schedule.step()
        run.seconds.append(time.perf_counter() - start)
        run.losses.append(sum(losses) / len(losses))
        run.errors.append(error(model, images.test_images, images.test_labels))
    if isinstance(optimizer, FGSGD):
        run.violation = optimizer.violation()
    return run


def error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of wrong answers in %."""
    model.eval()
    with torch.no_grad():
        answers = torch.cat([model(some).argmax(1) for some in torch.split(images, 500)])
    return 100 * (answers != labels).double().mean().item()


#: A method has learned if its test error is within this many points of SGD's.
MARGIN = 3.0

#: float32 weights lie on their manifold up to tens of roundings (eps = 1.2e-7); steps that drift would show 1e-4.
VIOLATION = 1e-5


def complaints(runs: Sequence[Run]) -> list[str]:
    """What is wrong with ``runs``, the first of them SGD's: errors beyond the margin, constraints that do not hold."""
    yardstick = runs[0]
    found = []
    for run in runs:
        if not run.errors[-1] <= yardstick.errors[-1] + MARGIN:
            found.append(
                f"{run.method}: wanted a test error within {MARGIN:g} points of {yardstick.method}'s "
                f"{yardstick.errors[-1]:.1f} %, got {run.errors[-1]:.1f} %."
            )
        if run.violation is not None and not run.violation <= VIOLATION:
            found.append(f"{run.method}: wanted constraints to hold to {VIOLATION:g}, got {run.violation:.1e}.")
    return found
