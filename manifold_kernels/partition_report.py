"""What :func:`~manifold_kernels.partition` drew: a table of groups, and a picture of a layer as [FG] Figures 1-2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from manifold_kernels.collection import Assignment, Collection

#: Numbers are written into the picture's cells up to this many outputs and inputs.
_NUMBERED = 24


def assignments(groups: Iterable[Mapping[str, Any]]) -> dict[str, tuple[Collection, Assignment]]:
    """The collection and the assignment of every weight on one, by the weight's name.

    Args:
        groups: the param groups of :func:`~manifold_kernels.partition`, or those of an optimizer made of them.

    >>> from torch import nn
    >>> from manifold_kernels import partition
    >>> _, drawn = assignments(partition(nn.Conv2d(4, 6, 3, bias=False), "po", ["sphere", "stiefel"]))["weight"]
    >>> drawn.groups.shape, drawn.sizes().tolist()
    (torch.Size([6, 4]), [2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    return {name: (of, one) for of, name, one in _assigned(groups)}


def partition_table(groups: Iterable[Mapping[str, Any]]) -> Table:
    """Components and groups of every weight on every manifold of its collection; ``groups`` as in :func:`assignments`.

    Sizes are the smallest and the largest number of components in a group.
    """
    table = Table("name", "scheme", "manifold", "components", "groups", "sizes", title="partition")
    for of, name, one in _assigned(groups):
        for position, manifold in enumerate(of.manifolds):
            sizes = one.sizes()[one.manifolds == position]
            spread = f"{int(sizes.min())} to {int(sizes.max())}" if sizes.numel() else ""
            first = (name, of.scheme) if position == 0 else ("", "")
            table.add_row(*first, repr(manifold), str(int(sizes.sum())), str(sizes.numel()), spread)
        table.add_section()
    return table


def draw_partition(of: Collection, assignment: Assignment, path: Path | str, title: str = "") -> Path:
    """Draw the grid of components, a row an output and a column an input, to ``path``: [FG] Figures 1 and 2.

    Colours are manifolds, their shades groups; small grids have the groups' numbers in their cells.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("draw_partition: needs matplotlib. Install it: `pip install matplotlib`.") from error
    hues = torch.tensor([colormaps["tab10"](position % 10)[:3] for position in range(len(of.manifolds))], device="cpu")
    shades = hues.new_ones(assignment.manifolds.numel(), 3)
    for position, hue in enumerate(hues):
        own = (assignment.manifolds == position).nonzero().flatten()
        # From the manifold's own colour to one with three fifths of white.
        white = torch.linspace(0, 0.6, max(own.numel(), 1), device="cpu")[: own.numel(), None]
        shades[own] = hue + (1 - hue) * white
    outputs, inputs = assignment.groups.shape
    height = min(max(1.5 + 0.3 * outputs, 2.5), 9.0)
    figure = Figure(figsize=(min(max(2.5 + 0.3 * inputs, 4.0), 9.0), height), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shades[assignment.groups].numpy(), interpolation="nearest", aspect="auto")
    axes.set(xlabel="input c", ylabel="output d", title=title)
    if max(outputs, inputs) <= _NUMBERED:
        for d in range(outputs):
            for c in range(inputs):
                axes.text(c, d, str(int(assignment.groups[d, c])), ha="center", va="center", fontsize=8)
    handles = [Patch(color=tuple(hue.tolist()), label=str(of.manifolds[at])) for at, hue in enumerate(hues)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _assigned(groups: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Collection, str, Assignment]]:
    for index, group in enumerate(groups):
        if not isinstance(group["manifold"], Collection):
            continue
        if "names" not in group:
            raise ValueError(f"groups: wanted param groups made by partition, got one without 'names' at {index}.")
        for name, one in zip(group["names"], group["assignments"], strict=True):
            yield group["manifold"], name, one
