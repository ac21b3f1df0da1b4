"""``manifold-kernels validate``."""

import itertools
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from manifold_kernels import ops
from manifold_kernels import validate as engine
from manifold_kernels.validate import Outcome


class _Line:
    """The cases of one line of a table: how many there are, and the one nearest to (or furthest beyond) its limit."""

    def __init__(self) -> None:
        self.count = 0
        self.worst = Outcome(0.0, 1.0)

    def add(self, outcome: Outcome) -> None:
        self.count += 1
        if self.count == 1 or outcome.error / outcome.limit > self.worst.error / self.worst.limit:
            self.worst = outcome


def _table(title: str, heading: str, lines: dict[tuple[str, str], _Line]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(heading)
    table.add_column("dtype")
    for name in ("cases", "worst error", "its limit"):
        table.add_column(name, justify="right")
    table.add_column("")
    for (label, dtype), line in lines.items():
        verdict = "[green]ok" if line.worst.passed else "[red]FAILED"
        table.add_row(label, dtype, str(line.count), f"{line.worst.error:.2f}", f"{line.worst.limit:.2f}", verdict)
    return table


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def validate(
    quick: Annotated[bool, typer.Option(help="Only contiguous float32 weights of one shape.")] = False,
) -> None:
    """Check every backend that is present against the float64 reference; errors are in units of rounding."""
    console = Console()
    failed = False
    for backend, missing in ops.backends().items():
        if missing is not None:
            console.print(f"[yellow]{backend}: not checked, it cannot be used here:[/] {missing}")
            continue
        lines: dict[tuple[str, str], _Line] = {}
        cases = list(engine.cases(quick))
        if engine.interpreted(backend) and not quick:
            cases = engine.spare()
            console.print(f"[yellow]{backend}: interpreted, hence {len(cases)} cases only; all of them on a GPU")
        for case in track(cases, backend, console=console, transient=True):
            outcome = engine.run(case, backend)
            lines.setdefault((case.label, _name(case.dtype)), _Line()).add(outcome)
            if not outcome.passed:
                failed = True
                console.print(f"[red]{backend}: {case}: error {outcome.error:.3g}, limit {outcome.limit:.3g}")
        console.print(_table(f"{backend}: steps", "step", lines))
        lines = {}
        for kind, size, dtype in itertools.product(engine.QR_KINDS, engine.QR_SIZES, (torch.float32, torch.float64)):
            outcome = engine.run_qr(kind, size, dtype, backend)
            lines.setdefault((kind, _name(dtype)), _Line()).add(outcome)
            failed |= not outcome.passed
        console.print(_table(f"{backend}: functional.qr, LAPACK's ratios", "matrices", lines))
    if failed:
        raise typer.Exit(1)
