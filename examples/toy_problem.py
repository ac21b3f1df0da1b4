"""[PSI] section 6.1 and Figure 4: how fast gradients become small, on a problem small enough to look at.

1,000 samples `y = mu^T x + noise` in 10 dimensions, the network `w1^T ELU(BN(W2 x))` with 100 hidden neurons, squared
loss. Every method steps the rows `w` of W2; w1, gamma and beta take plain SGD at one rate, the same for all methods
([PSI] Appendix F.2). Full batch (PSI-SGD is then PSI-GD) and mini-batches.

What counts is `||w|| ||grad_w L||` of the loss over all samples (root of the sum of squares over the rows), the
gradient at the normalised weights, which [PSI] Theorems 2 and 3 bound: the raw gradient is 1/||w|| of it and shrinks
merely because w grows. Both are measured, in two comparisons:

* tuned: every method at the rate of its grid with the lowest geometric mean of `||w|| ||grad_w L||` over the iterations
  and the tuning seeds, which are none of the seeds reported;
* the paper's: the rates of [PSI] Table 3. What the paper calls SGD has momentum and is SGDM here.

Methods are ordered by their geometric means over the iterations and the seeds reported. With the full batch the paper's
claim comes out: at its rates all three manifold methods are ahead of SGDM and Adam, tuned PSI-SGDM and SGD-G are. With
mini-batches SGDM has the smallest gradients: noise sets their size there, and the growth of w lowers the rate of SGDM,
`lr/||w||^2` on directions, as a schedule would; PSI keeps it constant.

Writes a figure and, with every number, a JSON file. Needs matplotlib.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from manifold_kernels import PSISGD, SGDG, info, param_groups

# A batch norm with the usual eps of 1e-5 is not exactly scale-invariant; torch refuses 0.
EPS = 1e-30
#: What is measured, of the loss over all samples; "rest" are w1, gamma and beta.
MEASURES = ("normalised gradient", "raw gradient", "gradient of the rest", "loss")
NORMALISED, RAW = MEASURES[:2]
FORMS = ("full batch", "mini-batches")
MOMENTUM = 0.9  # of SGDM, SGD-G and PSI-SGDM
TUNING_SEED = 1000  # the first; those reported start at 0

#: ``(model, rate, rest_rate)``: W2 is stepped at ``rate`` and everything else by plain SGD at ``rest_rate``.
Optimizers = Callable[[nn.Sequential, float, float], list[Optimizer]]


@dataclass(frozen=True)
class Method:
    """How W2 is stepped, the rates to choose from, and the rate of [PSI] Table 3, which does not have plain SGD."""

    optimizers: Optimizers
    rates: tuple[float, ...]
    paper_rate: float | None = None


@dataclass(frozen=True)
class Setting:
    """What the trainings of one form have in common; ``batch`` is ``None`` for the full batch."""

    batch: int | None
    rest_rate: float
    iterations: int
    every: int
    samples: int
    hidden: int


def _torch(kind: Callable[..., Optimizer], **options: float) -> Optimizers:
    def optimizers(model: nn.Sequential, rate: float, rest_rate: float) -> list[Optimizer]:
        rest = [parameter for parameter in model.parameters() if parameter is not model[0].weight]
        return [kind([model[0].weight], lr=rate, **options), SGD(rest, lr=rest_rate)]

    return optimizers


def _manifold(kind: Callable[..., Optimizer], manifold: str, momentum: float) -> Optimizers:
    def optimizers(model: nn.Sequential, rate: float, rest_rate: float) -> list[Optimizer]:
        groups = param_groups(model, manifold, euclidean={"lr": rest_rate, "momentum": 0.0})
        return [kind(groups, lr=rate, momentum=momentum)]

    return optimizers


METHODS = {
    "SGD": Method(_torch(SGD), (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)),
    "SGDM": Method(_torch(SGD, momentum=MOMENTUM), (0.1, 0.3, 1.0, 3.0, 10.0, 30.0), 0.1),
    "Adam": Method(_torch(Adam), (0.001, 0.003, 0.01, 0.03, 0.1, 0.3), 0.001),
    "SGD-G": Method(_manifold(SGDG, "grassmann", MOMENTUM), (0.01, 0.03, 0.1, 0.2, 0.3, 1.0, 3.0), 0.2),
    "PSI-SGD": Method(_manifold(PSISGD, "scale_invariant", 0.0), (0.03, 0.1, 0.3, 1.0, 3.0, 10.0), 1.0),
    "PSI-SGDM": Method(_manifold(PSISGD, "scale_invariant", MOMENTUM), (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), 0.1),
}


def problem(seed: int, samples: int = 1000, dimensions: int = 10) -> tuple[Tensor, Tensor]:
    """Inputs and labels; mu and the noise are standard normal, too."""
    generator = torch.Generator().manual_seed(seed)
    mu, inputs, noise = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((dimensions,), (samples, dimensions), (samples,))
    )
    return inputs, inputs @ mu + noise


def network(seed: int, hidden: int = 100, dimensions: int = 10) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(dimensions, hidden, bias=False),
        nn.BatchNorm1d(hidden, eps=EPS, track_running_stats=False),
        nn.ELU(),
        nn.Linear(hidden, 1, bias=False),
        nn.Flatten(0),
    ).double()
    nn.init.kaiming_normal_(model[0].weight)
    return model


def measure(model: nn.Sequential, inputs: Tensor, labels: Tensor) -> Tensor:
    """:data:`MEASURES`; the gradient stays in the parameters."""
    loss = _gradient(model, inputs, labels)
    weight = model[0].weight
    raw = weight.grad.norm(dim=1)
    rest = [parameter.grad.norm() for parameter in model.parameters() if parameter is not weight]
    return torch.stack([(weight.detach().norm(dim=1) * raw).norm(), raw.norm(), torch.stack(rest).norm(), loss])


def _gradient(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    model.zero_grad()
    loss = nn.functional.mse_loss(model(inputs), labels)
    loss.backward()
    return loss.detach()


def train(
    model: nn.Sequential, optimizers: list[Optimizer], inputs: Tensor, labels: Tensor, setting: Setting, seed: int
) -> Tensor:
    """Train and measure before the first iteration and after ``every`` so many: ``(1 + iterations / every, 4)``."""
    rows = []
    batches = _batches(len(labels), setting.batch, seed)
    for iteration in range(setting.iterations):
        if iteration % setting.every == 0:
            rows.append(measure(model, inputs, labels))
        some = next(batches)
        _gradient(model, inputs[some], labels[some])
        for optimizer in optimizers:
            optimizer.step()
    return torch.stack([*rows, measure(model, inputs, labels)])


def _batches(samples: int, batch: int | None, seed: int) -> Iterator[Tensor | slice]:
    shuffle = torch.Generator().manual_seed(seed)
    while batch is None:
        yield slice(None)
    while True:
        # Without the last samples, which fill no batch: statistics of a few would be poor ones.
        yield from torch.randperm(samples, generator=shuffle)[: samples // batch * batch].split(batch)


def trainings(method: Method, rate: float, setting: Setting, seeds: range) -> Tensor:
    """``(seeds, ...)``: what :func:`train` measures. A seed draws the problem, the weights and the batches."""
    curves = []
    for seed in seeds:
        model = network(seed, setting.hidden)
        optimizers = method.optimizers(model, rate, setting.rest_rate)
        curves.append(train(model, optimizers, *problem(seed, setting.samples), setting, seed))
    return torch.stack(curves)


def geometric_means(curves: Tensor) -> dict[str, float]:
    """Of every measure, over the iterations and the seeds; infinite where a training left the finite numbers."""
    means = curves.log().mean((0, 1)).exp().nan_to_num(math.inf, posinf=math.inf)
    return dict(zip(MEASURES, means.tolist(), strict=True))


@dataclass(frozen=True)
class Report:
    """A method at one rate: medians and quartiles over the seeds for every measure, and the grid that gave the rate."""

    rate: float
    grid: dict[float, float] | None
    geometric_means: dict[str, float]
    curves: dict[str, dict[str, list[float]]]

    @classmethod
    def of(cls, rate: float, grid: dict[float, float] | None, curves: Tensor) -> "Report":
        quartiles = {"low": 0.25, "median": 0.5, "high": 0.75}
        ordered = curves.nan_to_num(math.inf, posinf=math.inf)
        spread = {
            measure: {
                # Not between two seeds, of which one may be infinite.
                name: ordered[..., index].quantile(part, 0, interpolation="nearest").tolist()
                for name, part in quartiles.items()
            }
            for index, measure in enumerate(MEASURES)
        }
        return cls(rate, grid, geometric_means(curves), spread)


def main(
    iterations: Annotated[int, typer.Option(min=1, help="Of every training; a multiple of --every.")] = 300,
    every: Annotated[int, typer.Option(min=1, help="Iterations between two measurements.")] = 10,
    batch: Annotated[int, typer.Option(min=2, help="Samples of a mini-batch.")] = 128,
    samples: Annotated[int, typer.Option(min=2)] = 1000,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden neurons.")] = 100,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of every method that are reported.")] = 5,
    tuning_seeds: Annotated[int, typer.Option(min=1, help="Trainings for every rate of the grids.")] = 2,
    rest_full: Annotated[float, typer.Option(help="Rate of w1, gamma and beta, full batch.")] = 0.02,
    rest_mini: Annotated[float, typer.Option(help="Rate of w1, gamma and beta, mini-batches.")] = 0.003,
    output: Annotated[Path, typer.Option(help="The folder for the JSON file and the figure.")] = Path("results"),
) -> dict[str, Any]:
    """Compare the methods of [PSI] Figure 4 by the norms of their gradients."""
    if iterations % every:
        raise typer.BadParameter(f"iterations: wanted a multiple of every={every}, got {iterations}.")
    if batch > samples:
        raise typer.BadParameter(f"batch: wanted at most samples={samples}, got {batch}.")
    console = Console()
    settings = {
        form: Setting(size, rest_rate, iterations, every, samples, hidden)
        for form, size, rest_rate in zip(FORMS, (None, batch), (rest_full, rest_mini), strict=True)
    }
    grids: dict[tuple[str, str], dict[float, float]] = {}
    work = [(form, name, rate) for form in settings for name, method in METHODS.items() for rate in method.rates]
    for form, name, rate in track(work, "tuning", console=console, transient=True):
        curves = trainings(METHODS[name], rate, settings[form], range(TUNING_SEED, TUNING_SEED + tuning_seeds))
        grids.setdefault((form, name), {})[rate] = geometric_means(curves)[NORMALISED]
    chosen = [(form, "tuned", name, min(grid, key=grid.__getitem__)) for (form, name), grid in grids.items()]
    chosen += [(form, "paper", name, rate) for form, name in grids if (rate := METHODS[name].paper_rate)]
    reports: dict[str, dict[str, Report]] = {f"{form}, {rates}": {} for form, rates, *_ in chosen}
    for form, rates, name, rate in track(chosen, "training", console=console, transient=True):
        curves = trainings(METHODS[name], rate, settings[form], range(seeds))
        reports[f"{form}, {rates}"][name] = Report.of(rate, grids[form, name] if rates == "tuned" else None, curves)
    result = {
        "machine": info.machine(),
        "settings": {form: asdict(setting) for form, setting in settings.items()},
        "momentum": MOMENTUM,
        "eps": EPS,
        "seeds": seeds,
        "tuning seeds": tuning_seeds,
        "results": {title: {name: asdict(one) for name, one in by.items()} for title, by in reports.items()},
        "order": {title: {name: _order(by, name) for name in (NORMALISED, RAW)} for title, by in reports.items()},
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / "toy_problem.json"
    path.write_text(json.dumps(_finite(result), indent=1, allow_nan=False) + "\n")
    for title, by in reports.items():
        console.print(_table(title, by))
    console.print(f"written to {path} and {_plot(reports, every, path.with_suffix('.png'))}")
    return result


def _finite(value: Any) -> Any:
    """As JSON can say it: ``None`` for what is not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _order(reports: dict[str, Report], measure: str) -> list[str]:
    return sorted(reports, key=lambda name: reports[name].geometric_means[measure])


def _table(title: str, reports: dict[str, Report]) -> Table:
    table = Table(title=f"{title} rates: gradient norms, mean and at the end", title_justify="left")
    for heading in ("method", "rate", "normalised", "end", "raw", "end", "loss, end"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name in _order(reports, NORMALISED):
        report = reports[name]
        ends = {measure: curve["median"][-1] for measure, curve in report.curves.items()}
        shown = (report.geometric_means[NORMALISED], ends[NORMALISED], report.geometric_means[RAW], ends[RAW])
        table.add_row(name, f"{report.rate:g}", *(f"{value:.2g}" for value in shown), f"{ends['loss']:.3f}")
    return table


def _plot(reports: dict[str, dict[str, Report]], every: int, path: Path) -> Path:
    """Left what the paper shows, the raw gradient at its rates, right the normalised one at the best rates."""
    figure = Figure(figsize=(9.5, 6.8), layout="constrained")
    for axes, (form, rates, measure) in zip(
        figure.subplots(2, 2).flat,
        [(form, *column) for form in FORMS for column in (("paper", RAW), ("tuned", NORMALISED))],
        strict=True,
    ):
        for index, name in enumerate(METHODS):
            report = reports[f"{form}, {rates}"].get(name)
            if report is None:
                continue
            curve = report.curves[measure]
            steps = [every * row for row in range(len(curve["median"]))]
            axes.plot(steps, curve["median"], color=f"C{index}", label=f"{name}, lr {report.rate:g}", linewidth=1.4)
            axes.fill_between(steps, curve["low"], curve["high"], color=f"C{index}", alpha=0.15, linewidth=0)
        what = (
            "raw gradient, rates of Table 3" if rates == "paper" else "gradient at the normalised weights, best rates"
        )
        axes.set(title=f"{form}: {what}", xlabel="iteration", yscale="log")
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    torch.set_num_threads(1)  # what these small matrices gain by a second thread, they lose by waiting for it
    typer.run(main)
