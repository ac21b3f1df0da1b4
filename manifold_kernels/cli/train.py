"""``manifold-kernels train``: the demo."""

from enum import Enum
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from manifold_kernels.demo import data as sets
from manifold_kernels.demo.curves import plot
from manifold_kernels.demo.methods import METHODS
from manifold_kernels.demo.training import BATCH, Run, complaints
from manifold_kernels.demo.training import train as run_training


class Data(str, Enum):
    digits = "digits"
    fashion = "fashion"


def train(
    data: Annotated[Data, typer.Option(help="5,000 MNIST digits, or Fashion-MNIST of a Debian package.")] = Data.digits,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks in each of the three stages; 3 is ResNet-20.")] = 3,
    width: Annotated[int, typer.Option(min=1, help="Channels of the first stage.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the weights and batches.")] = 0,
    output: Annotated[Path, typer.Option(help="The folder for the curves.")] = Path("results"),
    check: Annotated[bool, typer.Option(help="Fail unless every method learns and every constraint holds.")] = False,
) -> None:
    """Train a small residual network by SGD, FG-SGD, PSI-SGD and PSI-SGDM and compare them."""
    console = Console()
    try:
        images = sets.SETS[data.value]()
    except (ImportError, FileNotFoundError) as error:
        console.print(f"[red]{error}")
        raise typer.Exit(2) from error
    batches = epochs * -(-len(images.train_labels) // BATCH)
    runs: list[Run] = []
    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[error]}"),
    )
    with Progress(*columns, console=console) as progress:
        for method in METHODS:
            task = progress.add_task(method.name, total=batches, error="")

            def show(run: Run, task: object = task) -> None:
                error = f"test error {run.errors[-1]:.1f} %" if run.errors else ""
                progress.update(task, advance=1, error=error)  # type: ignore[arg-type]

            runs.append(
                run_training(method, images, epochs=epochs, blocks=blocks, width=width, seed=seed, after_batch=show)
            )
    console.print(_table(runs))
    console.print(f"curves: {plot(runs, output / f'train-{data.value}.png')}")
    found = complaints(runs)
    for complaint in found:
        console.print(f"[red]{complaint}")
    if check and found:
        raise typer.Exit(1)


def _table(runs: list[Run]) -> Table:
    table = Table()
    table.add_column("method")
    for heading in ("test error %", "training loss", "s an epoch", "worst violation"):
        table.add_column(heading, justify="right")
    for run in runs:
        violation = "no constraint" if run.violation is None else f"{run.violation:.1e}"
        table.add_row(
            run.method, f"{run.errors[-1]:.1f}", f"{run.losses[-1]:.4f}", f"{median(run.seconds):.2f}", violation
        )
    return table
