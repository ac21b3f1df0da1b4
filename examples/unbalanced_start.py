"""[PSI] Figure 1: SGD feels how the neurons of a batch-normalised network are scaled, PSI-SGD does not.

A network of two batch-normalised layers ([PSI] Eq. 1) learns MNIST digits from a balanced start (He initialisation) and
from an unbalanced one, where the weights of the neurons are multiplied by `alpha` and `1/alpha` in turn. Both starts
compute the same function. Every method takes the best learning rate of one grid, at each start anew; gamma and beta of
the batch norms take plain SGD at one rate throughout.

PSI-SGD and PSI-SGDM give the same curve from both starts ([PSI] Theorem 1). SGD does not train the weights of an
unbalanced start at any rate of the grid: a step is worth `lr/||w||^2`, which differs by `alpha^4` between the neurons.
To be fair to it, it also gets the grid times `alpha^2` and `alpha^-2`, which suits one half of the neurons.

Writes a figure and, with every number, a JSON file. Needs mlxtend and matplotlib.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from manifold_kernels import PSISGD, info, param_groups
from manifold_kernels.demo.data import digits

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
REST_RATE = 0.1  # of gamma and beta
MOMENTUM = {"SGD": 0.0, "SGDM": 0.9, "PSI-SGD": 0.0, "PSI-SGDM": 0.9}
# A batch norm with the usual eps of 1e-5 feels the scale of small weights; torch refuses 0.
EPS = 1e-30


@dataclass
class Run:
    """A method from one start: the final loss for every rate (``None``: not finite), the best rate and its curve."""

    method: str
    start: str
    final_losses: dict[float, float | None]
    rate: float
    losses: list[float]

    @property
    def final_loss(self) -> float:
        return final(self.losses)


def network(hidden: int, seed: int, alpha: float) -> nn.Sequential:
    """In float64, where rounding stays far below what is to be seen."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in ((784, hidden), (hidden, 10)):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs, eps=EPS), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for layer in (model[0], model[3]):
            nn.init.kaiming_normal_(layer.weight)
            layer.weight[::2] *= alpha
            layer.weight[1::2] /= alpha
    return model


def optimizer_of(method: str, model: nn.Sequential, rate: float) -> torch.optim.Optimizer:
    rest = {"lr": REST_RATE, "momentum": 0.0}
    if method.startswith("PSI"):
        return PSISGD(param_groups(model, "scale_invariant", euclidean=rest), lr=rate, momentum=MOMENTUM[method])
    norms = [*model[1].parameters(), *model[4].parameters()]
    groups = [{"params": [model[0].weight, model[3].weight]}, {"params": norms, **rest}]
    return torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM[method])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """The training loss of every iteration."""
    losses = []
    for images, labels in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def batches_of(iterations: int, batch: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    data = digits()
    images, labels = data.train_images.flatten(1).double(), data.train_labels
    shuffle = torch.Generator().manual_seed(seed)
    full = len(labels) // batch * batch
    epochs = -(-iterations * batch // full)
    order = torch.cat([torch.randperm(len(labels), generator=shuffle)[:full] for _ in range(epochs)])
    return [(images[some], labels[some]) for some in order.split(batch)[:iterations]]


def final(losses: list[float]) -> float:
    """The mean over the last tenth of the iterations."""
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def main(
    iterations: Annotated[int, typer.Option(min=10)] = 300,
    batch: Annotated[int, typer.Option(min=2, max=4000)] = 100,
    hidden: Annotated[int, typer.Option(min=2, help="Hidden neurons.")] = 64,
    alpha: Annotated[float, typer.Option(min=1.0, help="Neurons are multiplied by it and its inverse in turn.")] = 1e4,
    seed: Annotated[int, typer.Option(help="Of the weights and batches.")] = 0,
    output: Annotated[Path, typer.Option(help="The folder for the JSON file and the figure.")] = Path("results"),
) -> dict[str, object]:
    """Train from a balanced and from an unbalanced start by SGD and PSI-SGD, with and without momentum."""
    console = Console()
    batches = batches_of(iterations, batch, seed)
    fitted = [rate * factor for factor in (alpha**-2, alpha**2) for rate in RATES]
    cases = [(method, start, RATES) for method in MOMENTUM for start in ("balanced", "unbalanced")]
    cases.append(("SGD", "unbalanced, rates for half of the neurons", tuple(fitted)))
    curves: dict[tuple[str, str], dict[float, list[float]]] = {}
    work = [(method, start, rate) for method, start, rates in cases for rate in rates]
    for method, start, rate in track(work, "training", console=console, transient=True):
        model = network(hidden, seed, 1.0 if start == "balanced" else alpha)
        curves.setdefault((method, start), {})[rate] = train(model, optimizer_of(method, model, rate), batches)
    runs = [_best(method, start, tried) for (method, start), tried in curves.items()]
    by = {(run.method, run.start): run for run in runs}
    differences = {
        method: _largest_difference(by[method, "balanced"].losses, by[method, "unbalanced"].losses)
        for method in MOMENTUM
    }
    result = {
        "machine": info.machine(),
        "settings": {
            "iterations": iterations,
            "batch": batch,
            "hidden": hidden,
            "alpha": alpha,
            "seed": seed,
            "momentum": MOMENTUM,
            "rates": RATES,
            "rate of gamma and beta": REST_RATE,
            "eps": EPS,
        },
        "runs": [{**asdict(run), "final_loss": run.final_loss} for run in runs],
        "largest relative difference of the curves": differences,
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / "unbalanced_start.json"
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    console.print(_table(runs, differences))
    console.print(f"written to {path} and {_plot(runs, differences, path.with_suffix('.png'))}")
    return result


def _best(method: str, start: str, curves: dict[float, list[float]]) -> Run:
    scores = {rate: final(losses) for rate, losses in curves.items()}
    finite = {rate: score for rate, score in scores.items() if math.isfinite(score)}
    rate = min(finite, key=finite.__getitem__)
    return Run(method, start, {rate: finite.get(rate) for rate in scores}, rate, curves[rate])


def _largest_difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) / a for a, b in zip(one, other, strict=True))


def _table(runs: list[Run], differences: dict[str, float]) -> Table:
    table = Table(title="mean loss of the last tenth, at the best rate")
    for heading in ("method", "start"):
        table.add_column(heading)
    for heading in ("rate", "final loss", "curves differ by"):
        table.add_column(heading, justify="right")
    for run in runs:
        difference = f"{differences[run.method]:.1e}" if run.start == "unbalanced" else ""
        table.add_row(run.method, run.start, f"{run.rate:.3g}", f"{run.final_loss:.4f}", difference)
    return table


def _plot(runs: list[Run], differences: dict[str, float], path: Path) -> Path:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    window = np.ones(10) / 10
    colours = {"SGD": "C0", "SGDM": "C1", "PSI-SGD": "C2", "PSI-SGDM": "C3"}
    styles = {"balanced": "-", "unbalanced": "--"}
    for run in runs:
        axes = panels[int(run.method.startswith("PSI"))]
        # Dashes in black: in the right panel they would hide the curve that they lie on.
        colour = "black" if axes is panels[1] and run.start != "balanced" else colours[run.method]
        smooth = np.convolve(run.losses, window, "valid")
        label = f"{run.method}, {run.start}, lr {run.rate:.2g}"
        axes.plot(smooth, styles.get(run.start, ":"), color=colour, label=label, linewidth=1.4)
    worst = max(difference for method, difference in differences.items() if method.startswith("PSI"))
    panels[0].set(title="Euclidean", ylabel="training loss, mean of 10 iterations", yscale="log")
    panels[1].set(title=f"PSI: both starts agree to {worst:.0e}")
    panels[0].legend(fontsize=7, loc="upper right", bbox_to_anchor=(1, 0.85))
    panels[1].legend(fontsize=7)
    for axes in panels:
        axes.set(xlabel="iteration")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    torch.set_num_threads(1)  # what these small matrices gain by a second thread, they lose by waiting for it
    typer.run(main)
