"""``manifold-kernels bench``."""

import os
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from manifold_kernels import info, ops
from manifold_kernels.bench import plots as drawing
from manifold_kernels.bench.cases import PEER, QUICK_METHODS, QUICK_WORKLOADS, Case, cases, usable
from manifold_kernels.bench.measure import Bandwidth, Result, bandwidth, measure, threads
from manifold_kernels.bench.report import Report, short

#: A load average that is more than this process and a shell.
_BUSY = 1.0

#: For each case.
_SECONDS, _QUICK_SECONDS = 1.2, 0.3


def bench(
    quick: Annotated[bool, typer.Option(help="A few workloads and methods, in less than a minute.")] = False,
    workload: Annotated[list[str] | None, typer.Option(help="Workloads by name or pattern ('conv *').")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Methods by name or pattern ('stiefel*').")] = None,
    retractions: Annotated[bool, typer.Option(help="With every retraction, not only the default ones.")] = False,
    peers: Annotated[bool, typer.Option(help="With geoopt and plain PyTorch, where they can be used.")] = False,
    device: Annotated[str, typer.Option(help="Where weights lie: cpu, or cuda for a GPU.")] = "cpu",
    backend: Annotated[list[str] | None, typer.Option(help="Backends by name; the default one otherwise.")] = None,
    thread: Annotated[
        list[int] | None,
        typer.Option("--threads", min=1, help="Numbers of threads; one and all otherwise, on a GPU one."),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=2, help=f"Turns a case; as many as fit into {_SECONDS} s otherwise.")
    ] = None,
    json: Annotated[Path, typer.Option(help="The file to write.")] = Path("results/bench.json"),
    plots: Annotated[Path | None, typer.Option(help="A folder for plots (needs matplotlib).")] = None,
    read: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Show an earlier file; nothing is measured.")
    ] = None,
) -> None:
    """Time a step against torch.optim.SGD(momentum=0.9, fused=True) on the same tensors in the same run.

    Repeat --workload, --method, --backend and --threads for several.
    """
    console = Console()
    if plots is not None and (reason := drawing.missing()) is not None:
        raise typer.BadParameter(reason)
    try:
        if read is not None:
            report = Report.read(read)
            for lines in _by_workload(report.results):
                console.print(_table(lines))
        else:
            _check(device)
            backends = backend or [ops.automatic(device)]
            for name in backends:
                ops.resolve(name, torch.device(device))
            found, missing = usable() if peers else ([], {})
            for name, reason in missing.items():
                console.print(f"[yellow]{name}: left out:[/] {reason}")
            chosen = cases(
                workloads=workload or (QUICK_WORKLOADS if quick else ()),
                methods=method or (QUICK_METHODS if quick else ()),
                backends=backends,
                threads=thread or sorted({1, info.processors() if device == "cpu" else 1}),
                retractions=retractions,
                peers=found,
                device=device,
            )
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error
    if read is None:
        report = _run(chosen, device, _QUICK_SECONDS if quick else _SECONDS, repeats, console)
        report.write(json)
        console.print(f"written to {json}")
    _conclude(report, console)
    if plots is not None:
        for path in drawing.draw(report, plots):
            console.print(f"plot: {path}")


def _check(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: wanted 'cpu' or 'cuda', got {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device: wanted a GPU that torch {torch.__version__} can use, got none on this machine.")


def _run(chosen: list[Case], device: str, seconds: float, repeats: int | None, console: Console) -> Report:
    """Measure, and show every workload as soon as it is done; what is there when the user interrupts is a report."""
    load = os.getloadavg()[0]
    if load > _BUSY:
        console.print(f"[yellow]The machine is busy (load {load:.1f}): figures of more than one thread suffer most.")
    rates: dict[int, Bandwidth] = {}
    results: list[Result] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("memory", total=len(chosen))
        try:
            for count in sorted({case.threads for case in chosen}):
                with threads(count):
                    rates[count] = bandwidth(device)
            for _, same_workload in groupby(chosen, lambda case: case.workload.name):
                lines: list[Result] = []
                for count, group in groupby(same_workload, lambda case: case.threads):
                    with threads(count):
                        for case in group:
                            progress.update(task, description=f"{case.workload.name}, {case.method}, {count} threads")
                            progress.refresh()
                            line = _measure(case, seconds, repeats, progress.console)
                            lines += [line] if line else []
                            results += [line] if line else []
                            progress.advance(task)
                if lines:
                    progress.console.print(_table(lines))
        except KeyboardInterrupt:
            progress.console.print("[yellow]interrupted: the figures so far follow")
    return Report.of(results, rates, load)


def _measure(case: Case, seconds: float, repeats: int | None, console: Console) -> Result | None:
    """The result, or ``None`` where other people's code fails, with its reason on the console."""
    try:
        return measure(case, seconds, repeats)
    except RuntimeError as error:
        if case.backend != PEER:
            raise
        console.print(f"[yellow]{case.method} fails on {case.workload.name}:[/] {error}")
        return None


def _by_workload(results: Iterable[Result]) -> list[list[Result]]:
    return [list(lines) for _, lines in groupby(results, lambda line: line.workload)]


def _table(results: list[Result]) -> Table:
    """One workload's figures."""
    of = results[0]
    title = f"{of.workload}: {of.elements:,} weights; time / that of {of.baseline}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for heading in ("thr.", "other ms", "step ms", "ratio", "quartiles", "GB/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in results:
        low, high = line.ratio_quartiles
        table.add_row(
            line.column,
            str(line.threads),
            f"{line.baseline_ms:.3f}",
            f"{line.step_ms:.3f}",
            short(line.ratio),
            f"{short(low)}-{short(high)}",
            f"{line.gigabytes_per_second:.1f}",
        )
    return table


def _conclude(report: Report, console: Console) -> None:
    """The ratios at a glance, and the memory's rate."""
    if report.results:
        console.print("Median ratios, " + " / ".join(f"{count} thr." for count in report.threads()) + ":\n")
        for row in report.markdown():
            console.print(row, soft_wrap=True, markup=False, highlight=False)
        console.print()
    for count, rates in report.bandwidth.items():
        what = f"memory, {count} thread{'s' * (count > 1)}"
        console.print(f"{what}: {rates.copy:.1f} GB/s by a copy, {rates.update:.1f} GB/s by an update in place")
