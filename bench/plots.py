"""The plots of the experiments: one line for each method, in panels."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure


def _panels(rows: Sequence[int], title: str) -> Figure:
    figure = Figure(figsize=(7, 1 + 0.27 * sum(rows)), layout="constrained")
    figure.subplots(len(rows), 1, sharex=True, height_ratios=rows, squeeze=False)
    figure.suptitle(title, fontsize="medium")
    return figure


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def error_bars(panels: Mapping[str, Mapping[str, Sequence[float]]], title: str, label: str, path: Path) -> Path:
    """Draw mean and standard deviation of each method's values, and the values, one panel above the other.

    Args:
        panels: panel -> method -> values.
        title: above them.
        label: what the values are.
        path: of the PNG file.
    """
    figure = _panels([len(methods) for methods in panels.values()], title)
    for axes, (panel, methods) in zip(figure.axes, panels.items(), strict=True):
        for line, values in enumerate(methods.values()):
            mean = sum(values) / len(values)
            deviation = (sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)) ** 0.5
            axes.plot(values, [line] * len(values), ".", color="0.6", zorder=1)
            axes.errorbar(mean, line, xerr=deviation, fmt="o", color="C0", capsize=3, zorder=2)
        _name_lines(axes, panel, list(methods))
    figure.axes[-1].set_xlabel(label)
    return _save(figure, path)


def ratio_bars(
    ratios: Mapping[str, tuple[float, float, float]],
    published: Mapping[str, float],
    bounds: Mapping[str, float],
    title: str,
    label: str,
    path: Path,
) -> Path:
    """Draw medians with quartiles as bars, beside what the papers say.

    Args:
        ratios: method -> lower quartile, median, upper quartile.
        published: method -> the ratio that a paper measured.
        bounds: method -> the ratio that a paper stays below.
        title: above the bars.
        label: what the ratios are.
        path: of the PNG file.
    """
    figure = _panels([len(ratios)], title)
    (axes,) = figure.axes
    for line, (low, median, high) in enumerate(ratios.values()):
        axes.barh(line, median, xerr=[[median - low], [high - median]], color="C0", height=0.6, capsize=3)
    for marks, marker, name in ((published, "D", "measured in the paper"), (bounds, "<", "bound given in the paper")):
        lines = [line for line, method in enumerate(ratios) if method in marks]
        axes.plot([marks[list(ratios)[line]] for line in lines], lines, marker, color="C3", ls="none", label=name)
    axes.axvline(1, color="0.3", lw=0.8)
    _name_lines(axes, "", list(ratios))
    axes.set_xlabel(label)
    axes.legend()
    return _save(figure, path)


def _name_lines(axes, title: str, names: Sequence[str]) -> None:  # type: ignore[no-untyped-def]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)  # from top to bottom
    axes.grid(axis="x", alpha=0.3)
    if title:
        axes.set_title(title, fontsize="small", loc="left")
