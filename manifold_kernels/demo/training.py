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
from manifold_kernels.optim import FGSGD, SGDG
from manifold_kernels.renormalize import Renormalizer

BATCH = 128

#: The learning rate falls to a fifth at these parts of the epochs ([PSI] section 6.2).
MILESTONES = (0.3, 0.6, 0.8)


@dataclass
class Run:
    """What became of one training.

    Attributes:
        method: its name.
        losses: mean training loss of every epoch, without a penalty.
        errors: test error in % after every epoch.
        seconds: time of every epoch's training.
        violation: the largest relative violation of a constraint at the end, ``None`` where nothing is constrained.
    """

    method: str
    losses: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    violation: float | None = None


class Training:
    """A new network in training by ``method``, an epoch at a time.

    Every method sees the same initial weights and the same batches.

    Args:
        method: how.
        images: what with.
        epochs: as many as the learning rate is scheduled for.
        blocks: of the network, in each of its three stages.
        width: of the network's first stage.
        seed: of weights, batches and collections.
    """

    def __init__(self, method: Method, images: Images, *, epochs: int, blocks: int, width: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.method, self.images = method, images
        self.model = ResNet(blocks, width)
        self.optimizer = method.optimizer(self.model, method.lr, seed)
        milestones = sorted({max(1, round(part * epochs)) for part in MILESTONES})
        self._schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, milestones, gamma=0.2)
        self._shuffle = torch.Generator().manual_seed(seed)
        self._renormalizer: Renormalizer | None = None
        if method.renormalised:
            assert isinstance(self.optimizer, FGSGD)
            self._renormalizer = Renormalizer(self.model, self.optimizer)
            self._renormalizer.trace(images.train_images[:1])

    def epoch(self, after_batch: Callable[[], None] = lambda: None) -> float:
        """Train for one epoch; the mean training loss."""
        if self._renormalizer is not None:
            # At the start: after the epoch, the averages of the batch norms would not be those of the weights.
            self._renormalizer.step()
        self.model.train()
        losses = []
        for batch in torch.randperm(len(self.images.train_labels), generator=self._shuffle).split(BATCH):  # type: ignore[no-untyped-call]
            self.optimizer.zero_grad()
            loss = cross_entropy(self.model(self.images.train_images[batch]), self.images.train_labels[batch])
            total = loss if self.method.penalty is None else loss + self.method.penalty(self.optimizer)
            total.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            losses.append(loss.item())
            after_batch()
        self._schedule.step()
        return sum(losses) / len(losses)

    def error(self) -> float:
        """The share of wrong answers to the test images in %."""
        return error(self.model, self.images.test_images, self.images.test_labels)

    def violation(self) -> float | None:
        """The largest relative violation of a constraint, ``None`` where nothing is constrained."""
        return self.optimizer.violation() if isinstance(self.optimizer, (FGSGD, SGDG)) else None


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
    """Train a new network from start to end, as :class:`Training` does."""
    training = Training(method, images, epochs=epochs, blocks=blocks, width=width, seed=seed)
    run = Run(method.name)
    for _ in range(epochs):
        start = time.perf_counter()
        run.losses.append(training.epoch(lambda: after_batch(run)))
        run.seconds.append(time.perf_counter() - start)
        run.errors.append(training.error())
    run.violation = training.violation()
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
