"""The figures of a run as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from manifold_kernels.bench.cases import PEER
from manifold_kernels.bench.measure import Result
from manifold_kernels.bench.report import Report
from manifold_kernels.bench.workloads import SERIES, SERIES_METHODS


def missing() -> str | None:
    """Why nothing can be drawn here, or ``None``."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "plots: need matplotlib. Install it: `pip install matplotlib`."
    return None


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw ratios, those of peers and throughputs to PNG files in ``folder``, where ``report`` has any.

    Raises:
        ImportError: without matplotlib.
    """
    if (reason := missing()) is not None:
        raise ImportError(reason)
    folder.mkdir(parents=True, exist_ok=True)
    own = [line for line in report.results if line.backend != PEER]
    peers = [line for line in report.results if line.backend == PEER]
    series = [line for line in own if line.workload in SERIES and line.method in SERIES_METHODS]
    series = [line for line in series if line.backend == series[0].backend]
    drawn = []
    if own:
        drawn.append(_ratios(own, folder / "ratios.png"))
    if peers:
        compared = [line for line in own if line.workload in {peer.workload for peer in peers}]
        compared = [line for line in compared if line.method in ("sphere", "stiefel")]
        drawn.append(_ratios([*compared, *peers], folder / "peers.png"))
    if len({line.workload for line in series}) > 1:
        drawn.append(_throughput(series, report, folder / "throughput.png"))
    return drawn


def _ratios(results: Sequence[Result], path: Path) -> Path:
    """A panel for each workload, in it a bar for each method and number of threads, from 1 to the ratio."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    panels = {name: [line for line in results if line.workload == name] for name in _distinct(results, "workload")}
    methods = {name: list(dict.fromkeys(line.column for line in lines)) for name, lines in panels.items()}
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    sizes = [len(own) for own in methods.values()]
    heights = [1.5 + max(sizes[row * columns : (row + 1) * columns]) for row in range(rows)]
    figure = Figure(figsize=(1 + 5 * columns, 0.6 + 0.24 * sum(heights)), layout="constrained")
    figure.suptitle("time of a step / time of its yardstick", fontsize="medium")
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights, sharex=True).flatten()
    for axes, (workload, lines) in zip(grid, panels.items(), strict=False):
        for place, count in enumerate(_distinct(results, "threads")):
            _bars(axes, [line for line in lines if line.threads == count], methods[workload], place, count)
        axes.set_title(f"{workload}, against {lines[0].baseline}", fontsize="small", loc="left")
        axes.set_yticks(range(len(methods[workload])), methods[workload], fontsize="small")
        axes.set_ylim(len(methods[workload]) - 0.5, -0.5)  # from top to bottom
        axes.axvline(1, color="0.2", lw=1)
        axes.grid(axis="x", alpha=0.3)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(LogLocator(subs=()))
        axes.tick_params(labelbottom=True)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    grid[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return path


def _bars(axes: Any, lines: Sequence[Result], methods: Sequence[str], place: int, threads: int) -> None:
    height = 0.38
    at = [methods.index(line.column) + (place - 0.5) * height for line in lines]
    color = f"C{place}"
    axes.barh(at, [line.ratio - 1 for line in lines], height, left=1, color=color, label=_threads(threads))
    for y, line in zip(at, lines, strict=True):
        axes.plot(line.ratio_quartiles, (y, y), color="0.2", lw=0.8)


def _throughput(results: Sequence[Result], report: Report, path: Path) -> Path:
    """GB/s against the number of weights, beside the memory's; a panel for each number of threads."""
    from matplotlib.figure import Figure

    counts = _distinct(results, "threads")
    figure = Figure(figsize=(2.2 + 4 * len(counts), 3.8), layout="constrained")
    for axes, count in zip(figure.subplots(1, len(counts), sharey=True, squeeze=False)[0], counts, strict=True):
        lines = [line for line in results if line.threads == count]
        for method in _distinct(lines, "method"):
            own = [line for line in lines if line.method == method]
            _curve(axes, [(line.elements, line.gigabytes_per_second) for line in own], method)
            if method == "sphere":
                sgd = [(line.elements, 20 * line.elements / line.baseline_ms / 1e6) for line in own]
                _curve(axes, sgd, "fused SGD", color="0.2", ls="--")
        axes.axhline(report.bandwidth[count].update, color="C3", lw=1, label="memory: update of 256 MB")
        axes.axhline(report.bandwidth[count].copy, color="C3", lw=1, ls=":", label="memory: copy of 256 MB")
        axes.set(xscale="log", xlabel="weights", title=f"3x3 convolutions, {_threads(count)}")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("GB/s, of the bytes that a step must move")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=110)
    return path


def _curve(axes: Any, points: Sequence[tuple[int, float]], label: str, **style: Any) -> None:
    sizes, rates = zip(*sorted(points), strict=True)
    axes.plot(sizes, rates, marker="o", markersize=3, label=label, **style)


def _distinct(results: Sequence[Result], name: str) -> list[Any]:
    return list(dict.fromkeys(getattr(line, name) for line in results))


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"
