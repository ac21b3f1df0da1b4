"""The curves of the demo as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from manifold_kernels.demo.training import Run


def plot(runs: Sequence[Run], path: Path) -> Path:
    """Draw test errors and training losses over the epochs to ``path``.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("curves: need matplotlib. Install it: `pip install matplotlib`.") from error
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, title in zip(figure.subplots(1, 2), ("test error, %", "training loss"), strict=True):
        for run in runs:
            values = run.errors if axes is figure.axes[0] else run.losses
            axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=run.method)
        axes.set(title=title, xlabel="epoch", yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
