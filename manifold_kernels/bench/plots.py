"""The figures of a run as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from manifold_kernels.bench.cases import PEER
from manifold_kernels.bench.measure import Result
from manifold_kernels.bench.report import Report
from manifold_kernels.bench.workloads import SERIES


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
    series = [line for line in own if line.workload in SERIES and line.backend == own[0].backend]
    drawn = []
    if own:
        drawn.append(_ratios(own, folder / "ratios.png"))
    if peers:
        compared = [line for line in own if line.workload in {peer.workload for peer in peers}]
        compared = [line for line in compared if line.method in ("sphere", "stiefel")]
        drawn.append(_ratios([*compared, *peers], folder / "peers.png", log=True))
    if len({line.workload for line in series}) > 1:
        drawn.append(_throughput(series, report, folder / "throughput.png"))
    return drawn


def _ratios(results: Sequence[Result], path: Path, log: bool = False) -> Path:
    """A panel for each workload, in it a bar for each method and number of threads, and the line at 1."""
    from matplotlib.figure import Figure

    workloads = list(dict.fromkeys(line.workload for line in results))
    counts = sorted({line.threads for line in results})
    methods = {
        name: list(dict.fromkeys(line.column for line in results if line.workload == name)) for name in workloads
    }
    figure = Figure(figsize=(8, 0.7 + sum(0.55 + 0.24 * len(own) for own in methods.values())), layout="constrained")
    heights = [1.2 + len(own) for own in methods.values()]
    panels = figure.subplots(len(workloads), 1, squeeze=False, height_ratios=heights, sharex=log)[:, 0]
    height = 0.8 / len(counts)
    for axes, workload in zip(panels, workloads, strict=True):
        for place, count in enumerate(counts):
            lines = [line for line in results if (line.workload, line.threads) == (workload, count)]
            at = [methods[workload].index(line.column) + (place + 0.5) * height - 0.4 for line in lines]
            ratios = [line.ratio for line in lines]
            spread = [[line.ratio - line.ratio_quartiles[0] for line in lines]]
            spread += [[line.ratio_quartiles[1] - line.ratio for line in lines]]
            label = f"{count} thread{'s' * (count > 1)}"
            axes.barh(at, ratios, height, xerr=spread, color=f"C{place}", label=label, error_kw={"lw": 0.8})
        baseline = next(line.baseline for line in results if line.workload == workload)
        axes.set_yticks(range(len(methods[workload])), methods[workload], fontsize="small")
        axes.set_ylim(len(methods[workload]) - 0.5, -0.5)  # from top to bottom
        axes.set_title(f"{workload}: time of a step / that of {baseline}", fontsize="small", loc="left")
        axes.axvline(1, color="0.2", lw=1)
        axes.grid(axis="x", alpha=0.3)
        if log:
            axes.set_xscale("log")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return path


def _throughput(results: Sequence[Result], report: Report, path: Path) -> Path:
    """GB/s against the number of weights, beside the memory's; a panel for each number of threads."""
    from matplotlib.figure import Figure

    counts = sorted({line.threads for line in results})
    figure = Figure(figsize=(4.5 * len(counts), 3.8), layout="constrained")
    for axes, count in zip(figure.subplots(1, len(counts), sharey=True, squeeze=False)[0], counts, strict=True):
        lines = [line for line in results if line.threads == count]
        for method in dict.fromkeys(line.method for line in lines):
            own = [line for line in lines if line.method == method]
            _curve(axes, [(line.elements, line.gigabytes_per_second) for line in own], method)
        sgd = [
            (line.elements, 20 * line.elements / line.baseline_ms / 1e6) for line in lines if line.method == "sphere"
        ]
        _curve(axes, sgd, "fused SGD", color="0.2", ls="--")
        axes.axhline(report.copy_bandwidth[count], color="C3", lw=1, label="copy of 256 MB: the memory")
        title = f"3x3 convolutions, {count} thread{'s' * (count > 1)}"
        axes.set(xscale="log", yscale="log", xlabel="weights", title=title)
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("GB/s, of the bytes that a step must move")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return path


def _curve(axes: Any, points: Sequence[tuple[int, float]], label: str, **style: Any) -> None:
    if points:
        sizes, rates = zip(*sorted(points), strict=True)
        axes.plot(sizes, rates, marker="o", markersize=3, label=label, **style)
