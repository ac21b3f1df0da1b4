"""Param groups as a table to read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from manifold_kernels.collection import Collection
from manifold_kernels.fit import scale_of
from manifold_kernels.manifolds import Euclidean, Manifold, _Scaled
from manifold_kernels.views import Layout, shape_of

if TYPE_CHECKING:  # imported when a table is made: it takes longer than the rest of the package
    from rich.console import Console
    from rich.table import Table

_COLUMNS = ("name", "shape", "manifold", "scale", "view", "components", "grouping", "note")


def routing_table(groups: Iterable[Mapping[str, Any]]) -> Table:
    """Where every parameter went: the param groups of :func:`param_groups`, or those of an optimizer made of them.

    A row has name, shape, manifold, scale ``s``, view, components (how many matrices of which size), grouping (whether
    the components of a layer share one step size, or how many groups there are) and a note: why the weight is not where
    it was wanted, or which normalisation makes it scale-invariant. Lines separate the groups.

    Raises:
        ValueError: a group has no ``names``.
    """
    from rich.table import Table

    table = Table(*_COLUMNS, title="param groups")
    for index, group in enumerate(groups):
        if "names" not in group:
            raise ValueError(f"groups: wanted param groups made by param_groups, got one without 'names' at {index}.")
        for name, parameter in zip(group["names"], group["params"], strict=True):
            shape = "x".join(map(str, parameter.shape))
            table.add_row(name, shape, *_cells(group, name, parameter), group["notes"].get(name, ""))
        table.add_section()
    return table


def print_routing_table(groups: Iterable[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print :func:`routing_table`, by default to the standard output.

    >>> print_routing_table(param_groups(model, "stiefel"))  # doctest: +SKIP
    """
    from rich.console import Console

    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=200)  # a file has no width; rich would assume 80 and cut the notes to pieces
    console.print(routing_table(groups))


def _cells(group: Mapping[str, Any], name: str, parameter: Tensor) -> tuple[str, ...]:
    manifold: Manifold | Collection | None = group["manifold"]
    if manifold is None or isinstance(manifold, Euclidean):
        return ("euclidean", "", "", "", "")
    layout = Layout(group["view"], int(group["transposed"]), group["channel_groups"], group["rows"])
    shape = shape_of(parameter, layout)
    components = f"{shape.count} x {shape.n}x{shape.p}"
    if isinstance(manifold, Collection):
        groups = group["assignments"][group["names"].index(name)].manifolds.numel()
        return str(manifold), "", group["view"], components, f"{groups} groups"
    scale = ""
    if isinstance(manifold, _Scaled):
        scale = f"{scale_of(manifold, layout, parameter):.4g}" + (" (fan)" if manifold.scale == "fan" else "")
    return manifold.name, scale, group["view"], components, group.get("grouping", "layer")
