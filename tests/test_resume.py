"""A training that is interrupted and resumed from files gives the same bits as one that is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from manifold_kernels import FGSGD, Renormalizer, RobbinsMonroLR, partition

BATCHES, EPOCHS, INTERRUPTED = 5, 3, 8  # in the middle of the second epoch


class Training:
    """A PIO run over all four manifolds with momentum, a schedule and renormalisation at every epoch."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 1),
            nn.Flatten(),
            nn.Linear(96, 3),
        )
        groups = partition(self.model, "pio", ["sphere", "oblique", "stiefel", None], seed=seed, euclidean={"lr": 0.01})
        self.optimizer = FGSGD(groups, lr=0.05, momentum=0.9)
        self.schedule = RobbinsMonroLR(self.optimizer, t0=2.0)
        self.renormalizer = Renormalizer(self.model, self.optimizer)
        self.parts = (self.model, self.optimizer, self.schedule, self.renormalizer)
        self.done = 0

    def run(self, until: int) -> None:
        while self.done < until:
            if self.done % BATCHES == 0:
                self.renormalizer.trace(torch.zeros(1, 3, 4, 4))
                self.renormalizer.step()
            generator = torch.Generator().manual_seed(self.done)
            # Features with deviations above 1, so that lambda takes part.
            x = 3 * torch.randn(8, 3, 4, 4, generator=generator)
            y = torch.randint(3, (8,), generator=generator)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.done += 1
            if self.done % BATCHES == 0:
                self.schedule.step()

    def save(self, path: Path) -> None:
        torch.save([self.done, *(part.state_dict() for part in self.parts)], path)

    def load(self, path: Path) -> None:
        self.done, *states = torch.load(path, weights_only=True)
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)

    def everything(self) -> list[Tensor]:
        momenta = [self.optimizer.state[p]["momentum_buffer"] for p in self.model.parameters()]
        plan = self.optimizer.plan
        return [*self.model.state_dict().values(), *momenta, plan.groups, plan.components, plan.scales]


@pytest.mark.parametrize("interrupted", [INTERRUPTED, 2 * BATCHES])
def test_a_pio_run_with_renormalisation_resumes_to_the_bit(tmp_path: Path, interrupted: int) -> None:
    whole = Training(seed=0)
    whole.run(BATCHES * EPOCHS)
    whole.optimizer.check()
    scales = whole.optimizer.plan.scales
    assert scales.unique().numel() > 10  # lambda differs between inputs: renormalisation did take part

    first = Training(seed=0)
    first.run(interrupted)
    first.save(tmp_path / "checkpoint.pt")
    second = Training(seed=1)  # other weights, another draw
    second.load(tmp_path / "checkpoint.pt")
    second.run(BATCHES * EPOCHS)
    for one, two in zip(whole.everything(), second.everything(), strict=True):
        assert torch.equal(one, two)
