"""[PSI] Tables 1 and 2 and [FG] Table XII in small: the test error of every method of the two papers.

Run as ``python bench/paper_tables.py``. A narrow ResNet-20 learns digits (or clothes, ``--data fashion``) several times
by each method; every run becomes a JSON file, and what is there already is not run again, so that an interrupted call
goes on where it was. At the end it shows a table and draws error bars. Only the order of methods can be compared with
the papers, whose figures are of other images.

``--sweep`` looks for learning rates instead: with seeds that are not among the reported ones, on a fifth of the
training images, held out. It writes ``rates.json``, which ``--rates`` takes.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import options
from plots import error_bars
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from runs import file_name, load, save

from manifold_kernels.demo.data import Images
from manifold_kernels.demo.methods import FG, PSI, SUFFIX, SWEPT, Method, regularised, select
from manifold_kernels.demo.training import BATCH, Run, train

#: The test errors in %, CIFAR-10: [PSI] Tables 1 and 2, ResNet-20 (100 - accuracy), and [FG] Table XII, ResNet-44.
PUBLISHED = {
    "SGD": 8.86,
    "Adam": 10.10,
    "SGD-G": 8.62,
    "PSI-SGD": 7.75,
    "PSI-SGDM": 7.59,
    "SGD, regularised": 7.65,
    "Adam, regularised": 9.11,
    "SGD-G, regularised": 8.01,
    "PSI-SGD, regularised": 7.51,
    "PSI-SGDM, regularised": 7.30,
    "Euc. (SGD)": 7.05,
    "Sp": 6.84,
    "Ob": 6.87,
    "St": 6.73,
    "POMs of Sp": 6.81,
    "POMs of Ob": 6.85,
    "POMs of St": 6.70,
    "PI (Sp+Ob+St)": 6.31,
    "PI (Sp+Ob+St+Euc.)": 6.34,
    "PO (Sp+Ob+St)": 6.35,
    "PO (Sp+Ob+St+Euc.)": 6.22,
    "PIO (Sp+Ob+St)": 5.95,
    "PIO (Sp+Ob+St+Euc.)": 5.92,
}

#: The first seed of sweeps: not one of 0, 1, 2, ..., which are reported.
SWEEP_SEED = 1000

#: Multiples of a method's rate that sweeps try, unless told.
GRID = (0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Job:
    """A run that is wanted, and the file that it is kept in."""

    method: Method
    settings: dict[str, Any]
    path: Path

    @property
    def seed(self) -> int:
        return int(self.settings["seed"])


@dataclass(frozen=True)
class Line:
    """A line of the table: the test errors in % of all seeds after the last epoch, and what goes with them."""

    method: str
    lr: float
    errors: tuple[float, ...]
    seconds: float
    violation: float | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.errors)

    @property
    def deviation(self) -> float | None:
        """The standard deviation over the seeds, ``None`` for one."""
        return statistics.stdev(self.errors) if len(self.errors) > 1 else None


def parser() -> argparse.ArgumentParser:
    of = options.parser(__doc__, Path("results/papers"))
    of.add_argument("--regularizer", action="store_true", help="those of [PSI] Table 3, as in its Table 2")
    of.add_argument("--seeds", type=options.at_least(1), default=3, help="how many")
    of.add_argument("--epochs", type=options.at_least(1), default=12)
    of.add_argument("--rates", type=Path, help="a rates.json of --sweep, for learning rates other than the usual ones")
    of.add_argument("--sweep", action="store_true", help="look for learning rates")
    of.add_argument("--grid", type=float, nargs="+", metavar="FACTOR", help="of --sweep: multiples of the usual rate")
    return of


def main(arguments: Sequence[str] | None = None) -> list[Line]:
    """Run what is missing and show the table; its lines (of a sweep: the best of each method)."""
    of = parser()
    chosen = of.parse_args(arguments)
    if chosen.grid is not None and not chosen.sweep:
        of.error("argument --grid: is for --sweep, which is not there. Add it, or leave --grid out.")
    methods = PSI + SWEPT + FG
    methods = select(methods, chosen.methods)
    if chosen.regularizer:
        methods = [regularised(method) for method in methods]
    if chosen.rates is not None:
        methods = [with_rate(method, chosen.rates) for method in methods]
    images = options.images(chosen)
    with options.threads(chosen.threads):
        return sweep(methods, images, chosen) if chosen.sweep else compare(methods, images, chosen)


def with_rate(method: Method, path: Path) -> Method:
    """``method`` at the learning rate that stands in ``path``."""
    rates = json.loads(path.read_text())["result"]["rates"]
    if method.name not in rates:
        raise ValueError(f"--rates: wanted a rate for {method.name!r}, got {sorted(rates)} in {path}. Sweep it, too.")
    return replace(method, lr=rates[method.name])


def compare(methods: Sequence[Method], images: Images, chosen: argparse.Namespace) -> list[Line]:
    """Every method with every seed."""
    folder = chosen.output / chosen.data
    jobs = [
        job(method, seed, folder / f"{file_name(method.name)}-{seed}.json", chosen, images)
        for seed in range(chosen.seeds)
        for method in methods
    ]
    console = Console()
    results = carry_out(jobs, images, console)
    lines = [line(method, [run for job, run in results if job.method is method]) for method in methods]
    title = (
        f"{chosen.data}, {len(images.train_labels):,} training images, {options.network(chosen)}, "
        f"{chosen.epochs} epochs, {chosen.seeds} seeds{SUFFIX * chosen.regularizer}"
    )
    grouped = as_in_the_papers(lines)
    console.print(table(grouped, title))
    errors = {panel: {name: of.errors for name, of in members.items()} for panel, members in grouped.items()}
    plot = folder / f"test-errors{'-regularised' * chosen.regularizer}.png"
    console.print(f"plot: {error_bars(errors, title, 'test error, %', plot)}")
    return lines


def sweep(methods: Sequence[Method], images: Images, chosen: argparse.Namespace) -> list[Line]:
    """Every method at every rate of the grid; the best by the mean error on the images held out, then by the loss."""
    folder = chosen.output / chosen.data
    held_out = images.held_out()
    factors = sorted(chosen.grid or GRID)
    grid = {of.name: [replace(of, lr=float(f"{factor * of.lr:.3g}")) for factor in factors] for of in methods}
    jobs = [
        job(of, seed, folder / "sweep" / f"{file_name(of.name)}-{of.lr:g}-{seed}.json", chosen, held_out)
        for rates in grid.values()
        for of in rates
        for seed in range(SWEEP_SEED, SWEEP_SEED + chosen.seeds)
    ]
    console = Console()
    results = carry_out(jobs, held_out, console)
    best: list[Line] = []
    shown = Table(title="error on the images held out, %", title_justify="left")
    for heading in ("method", "at rate", "best"):
        shown.add_column(heading)
    for name, rates in grid.items():
        runs = [[run for job, run in results if job.method is of] for of in rates]
        lines = [line(of, group) for of, group in zip(rates, runs, strict=True)]
        losses = [statistics.fmean(run.losses[-1] for run in group) for group in runs]
        winner, _ = min(zip(lines, losses, strict=True), key=lambda pair: (pair[0].mean, pair[1]))
        best.append(winner)
        edge = " (edge)" if winner in (lines[0], lines[-1]) else ""
        shown.add_row(name, ", ".join(f"{of.lr:g}: {of.mean:.1f}" for of in lines), f"{winner.lr:g}{edge}")
    console.print(shown)
    settings = {name: vars(chosen)[name] for name in ("data", "epochs", "blocks", "width", "seeds")}
    path = folder / "rates.json"
    save(path, settings, {"rates": {of.method: of.lr for of in best}})
    console.print(f"rates: {path}")
    return best


def job(method: Method, seed: int, path: Path, chosen: argparse.Namespace, images: Images) -> Job:
    settings = {
        "method": method.name,
        "lr": method.lr,
        "seed": seed,
        "data": chosen.data,
        "train_images": len(images.train_labels),
        "epochs": chosen.epochs,
        "batch": BATCH,
        "blocks": chosen.blocks,
        "width": chosen.width,
        "threads": chosen.threads,
    }
    return Job(method, settings, path)


def carry_out(jobs: Sequence[Job], images: Images, console: Console) -> list[tuple[Job, Run]]:
    """The runs of all jobs, in their order; what is kept already is read."""
    found = [(job, load(job.path, job.settings)) for job in jobs]
    missing = [job for job, result in found if result is None]
    console.print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them there already")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console) as progress:
        batches = -(-len(images.train_labels) // BATCH)
        total = sum(job.settings["epochs"] for job in missing) * batches
        bar = progress.add_task("batches", total=total, now="")
        for job in missing:

            def show(run: Run, job: Job = job) -> None:
                error = f", test error {run.errors[-1]:.1f} %" if run.errors else ""
                epoch = f"epoch {len(run.losses) + 1}/{job.settings['epochs']}"
                now = f"{job.method.name} at {job.method.lr:g}, seed {job.seed}, {epoch}{error}"
                progress.update(bar, advance=1, now=now)

            of = job.settings
            run = train(
                job.method,
                images,
                epochs=of["epochs"],
                blocks=of["blocks"],
                width=of["width"],
                seed=job.seed,
                after_batch=show,
            )
            save(job.path, job.settings, asdict(run))
    return [(job, Run(**(result or load(job.path, job.settings)))) for job, result in found]


def line(method: Method, runs: Sequence[Run]) -> Line:
    violations = [run.violation for run in runs if run.violation is not None]
    return Line(
        method.name,
        method.lr,
        tuple(run.errors[-1] for run in runs),
        statistics.median(seconds for run in runs for seconds in run.seconds),
        max(violations, default=None),
    )


def as_in_the_papers(lines: Sequence[Line]) -> dict[str, dict[str, Line]]:
    """Table -> name -> line: those of [PSI], and those of [FG], which SGD heads once more."""
    psi = {of.name for method in PSI + SWEPT for of in (method, regularised(method))}
    ours = {of.method: of for of in lines if of.method in psi}
    others = {of.method: of for of in lines if of.method not in psi}
    euclidean = {f"Euc. ({name})": of for name, of in ours.items() if name.removesuffix(SUFFIX) == "SGD"}
    number = 2 if any(name.endswith(SUFFIX) for name in ours) else 1
    both = {f"[PSI] Table {number}": ours, "[FG] Table XII": {**euclidean, **others} if others else {}}
    return {title: members for title, members in both.items() if members}


def table(grouped: Mapping[str, Mapping[str, Line]], title: str) -> Table:
    shown = Table(title=title, title_justify="left")
    shown.add_column("method", no_wrap=True)
    for heading in ("lr", "test error %", "paper, CIFAR-10", "s an epoch", "worst violation"):
        shown.add_column(heading, justify="right")
    for paper, members in grouped.items():
        shown.add_section()
        shown.add_row(paper, style="bold")
        for name, of in members.items():
            deviation = "" if of.deviation is None else f" ± {of.deviation:.2f}"
            published = PUBLISHED.get(name, PUBLISHED.get(name.replace(SUFFIX, "")))
            shown.add_row(
                name,
                f"{of.lr:g}",
                f"{of.mean:.2f}{deviation}",
                "" if published is None else f"{published:.2f}",
                f"{of.seconds:.2f}",
                "no constraint" if of.violation is None else f"{of.violation:.1e}",
            )
    return shown


if __name__ == "__main__":
    main()
