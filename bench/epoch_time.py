"""The time of an epoch by every method against SGD, beside what the papers measured.

Run as ``python bench/epoch_time.py``. Methods take turns, one epoch each, and the ratio to fused SGD is taken within
a round, so that all see the same machine; figures are medians over the rounds, with the quartiles. The first round is
not counted. It measures and asserts nothing.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import options
import torch
from plots import ratio_bars
from rich.console import Console
from rich.progress import track
from rich.table import Table
from runs import save
from torch import nn

from manifold_kernels.demo.methods import FG, PSI, Method, select
from manifold_kernels.demo.training import BATCH, Training

#: [PSI] section 6.2: seconds for an epoch of ResNet-56 on CIFAR-10, on a GPU, over SGD's 16.98.
PUBLISHED = {"Adam": 18.1 / 16.98, "SGD-G": 26.6 / 16.98, "PSI-SGD": 18.2 / 16.98, "PSI-SGDM": 18.5 / 16.98}

#: [FG] Appendix C-A, convolution layers on a GPU: below these multiples of SGD.
BOUNDS = {"Sp": 3.0, "Ob": 3.0, "St": 6.0, "POMs of Sp": 3.0, "POMs of Ob": 3.0, "POMs of St": 6.0}


def _fused(model: nn.Module, lr: float, seed: int) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=True)


YARDSTICK = Method("SGD, fused", 0.1, _fused)


@dataclass(frozen=True)
class Timed:
    """Epochs of one method, one number a round: seconds, and those of them that the optimizer's steps take."""

    method: str
    seconds: tuple[float, ...]
    steps: tuple[float, ...]

    @property
    def share(self) -> float:
        """The median of the steps' share of an epoch."""
        return statistics.median(part / whole for part, whole in zip(self.steps, self.seconds, strict=True))

    def ratios(self, yardstick: "Timed") -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the ratio to ``yardstick``, round by round."""
        pairs = zip(self.seconds, yardstick.seconds, strict=True)
        low, median, high = statistics.quantiles([own / other for own, other in pairs], n=4, method="inclusive")
        return low, median, high


class Stopwatch:
    """Adds up the time of an optimizer's steps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.seconds = 0.0
        optimizer.register_step_pre_hook(self._start)
        optimizer.register_step_post_hook(self._stop)

    def _start(self, *_: object) -> None:
        self._from = time.perf_counter()

    def _stop(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._from


def measure(trainings: Sequence[Training], rounds: int, console: Console) -> list[Timed]:
    """``rounds`` epochs of every training in turn, after one that is not counted."""
    watches = [Stopwatch(training.optimizer) for training in trainings]
    seconds: list[list[float]] = [[] for _ in trainings]
    steps: list[list[float]] = [[] for _ in trainings]
    turns = [turn for _ in range(rounds + 1) for turn in range(len(trainings))]
    for turn in track(turns, "epochs", console=console, transient=True):
        watches[turn].seconds = 0.0
        start = time.perf_counter()
        trainings[turn].epoch()
        seconds[turn].append(time.perf_counter() - start)
        steps[turn].append(watches[turn].seconds)
    return [
        Timed(training.method.name, tuple(whole[1:]), tuple(part[1:]))
        for training, whole, part in zip(trainings, seconds, steps, strict=True)
    ]


def parser() -> argparse.ArgumentParser:
    of = options.parser(__doc__, Path("results/epoch-time"))
    of.add_argument("--rounds", type=options.at_least(2), default=9)
    return of


def main(arguments: Sequence[str] | None = None) -> list[Timed]:
    """Measure, show the table, write JSON and the plot."""
    chosen = parser().parse_args(arguments)
    methods = [YARDSTICK, *select(PSI + FG, chosen.methods)]
    images = options.images(chosen)
    console = Console()
    with options.threads(chosen.threads):
        size = {"blocks": chosen.blocks, "width": chosen.width}
        # The learning rate falls at the usual parts of the rounds, so that weights stay finite; time does not feel it.
        trainings = [Training(method, images, epochs=chosen.rounds + 1, seed=0, **size) for method in methods]
        results = measure(trainings, chosen.rounds, console)
    batches = -(-len(images.train_labels) // BATCH)
    title = (
        f"an epoch of {batches} batches of {BATCH} {chosen.data}, {options.network(chosen)}, {chosen.threads} threads, "
        f"{chosen.rounds} rounds"
    )
    console.print(table(results, title))
    settings = {name: value for name, value in vars(chosen).items() if name != "output"}
    save(chosen.output / "epoch-time.json", settings, {of.method: asdict(of) for of in results})
    ratios = {of.method: of.ratios(results[0]) for of in results}
    label = "time of an epoch / that of fused SGD"
    plot = ratio_bars(ratios, PUBLISHED, BOUNDS, title, label, chosen.output / "epoch-time.png")
    console.print(f"figures: {chosen.output / 'epoch-time.json'}, plot: {plot}")
    return results


def table(results: Sequence[Timed], title: str) -> Table:
    default = next((of for of in results if of.method == "SGD"), None)
    shown = Table(title=title, title_justify="left")
    shown.add_column("method", no_wrap=True)
    for heading in ("s an epoch", "/ fused SGD", "quartiles", "/ SGD", "the paper's", "steps' share", "step / fused"):
        shown.add_column(heading, justify="right")
    for of in results:
        low, median, high = of.ratios(results[0])
        published = f"{PUBLISHED[of.method]:.2f}" if of.method in PUBLISHED else ""
        shown.add_row(
            of.method,
            f"{statistics.median(of.seconds):.3f}",
            f"{median:.2f}",
            f"{low:.2f}-{high:.2f}",
            "" if default is None else f"{of.ratios(default)[1]:.2f}",
            f"< {BOUNDS[of.method]:g}" if of.method in BOUNDS else published,
            f"{100 * of.share:.1f} %",
            f"{statistics.median(of.steps) / statistics.median(results[0].steps):.1f}",
        )
    return shown


if __name__ == "__main__":
    main()
