"""``manifold-kernels bench``."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from manifold_kernels import bench as engine


def bench(
    quick: Annotated[bool, typer.Option(help="One workload and few repeats, under half a minute.")] = False,
    output: Annotated[Path, typer.Option(help="The JSON file to write.")] = Path("results/bench.json"),
) -> None:
    """Time a step against torch.optim.SGD(momentum=0.9, fused=True) on the same tensors in the same run."""
    console = Console()
    before = torch.get_num_threads()
    repeats = 15 if quick else 41
    cases = list(engine.cases(quick))
    try:
        bandwidth = {threads: engine.copy_bandwidth(threads) for threads in sorted({threads for *_, threads in cases})}
        results = [
            engine.measure(workload, method, threads, repeats)
            for workload, method, threads in track(cases, "timing", console=console, transient=True)
        ]
    finally:
        torch.set_num_threads(before)
    console.print("A step against fused SGD with momentum: medians, and the quartiles of the ratio.")
    for workload in dict.fromkeys(result.workload for result in results):
        console.print(_table(workload, [result for result in results if result.workload == workload]))
    for threads, rate in bandwidth.items():
        console.print(f"copy bandwidth of this machine, {threads} thread{'s' * (threads > 1)}: {rate:.1f} GB/s")
    engine.write(output, results, bandwidth)
    console.print(f"written to {output}")


def _table(workload: str, results: list[engine.Result]) -> Table:
    elements = results[0].elements
    table = Table(title=f"{workload}: {elements:,} elements", title_justify="left")
    table.add_column("method", no_wrap=True)
    for heading in ("threads", "SGD ms", "step ms", "ratio", "quartiles", "GB/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        low, high = result.ratio_quartiles
        table.add_row(
            result.method,
            str(result.threads),
            f"{result.sgd_ms:.3f}",
            f"{result.step_ms:.3f}",
            f"{result.ratio:.2f}",
            f"{low:.2f}-{high:.2f}",
            f"{result.gigabytes_per_second:.1f}",
        )
    return table
