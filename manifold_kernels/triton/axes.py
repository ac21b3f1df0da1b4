"""From a parameter's layout to the axes that kernels address it by: sizes and strides, merged where memory allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from manifold_kernels import views
from manifold_kernels.triton.addressing import DIM_COLUMNS, DIMS
from manifold_kernels.views import Layout

#: Size, and strides of weight, gradient and momentum.
Dim = tuple[int, int, int, int]


@dataclass(frozen=True)
class Axis:
    """Dimensions that one index runs over, the last one fastest."""

    dims: tuple[Dim, ...]

    @property
    def size(self) -> int:
        return math.prod(dim[0] for dim in self.dims)

    @property
    def contiguous(self) -> bool:
        """Whether the last dimension is contiguous in all three tensors."""
        return self.dims[-1][0] > 1 and self.dims[-1][1:] == (1, 1, 1)

    def reordered(self) -> Axis:
        """The same elements in the order of the weight's memory, for sums that do not mind."""
        return _merged(sorted(self.dims, key=lambda dim: -dim[1]))

    def numbers(self) -> list[int]:
        """The axis as a row of the table that kernels read."""
        if len(self.dims) > DIMS:
            raise ValueError(
                f"strides: wanted at most {DIMS} dimensions that do not merge, got {len(self.dims)}. Make the "
                "parameter contiguous or use backend='reference'."
            )
        flat = [number for dim in self.dims for number in dim]
        return flat + [0] * (DIMS * DIM_COLUMNS - len(flat))


def _merged(dims: Sequence[Dim]) -> Axis:
    """``dims`` without those of size 1, and neighbours as one where all strides allow it."""
    out: list[Dim] = []
    for size, *strides in dims:
        if size == 1:
            continue
        if out and all(before == size * stride for before, stride in zip(out[-1][1:], strides, strict=True)):
            size *= out.pop()[0]
        out.append((size, strides[0], strides[1], strides[2]))
    return Axis(tuple(out) or ((1, 0, 0, 0),))


@dataclass(frozen=True)
class Axes:
    """The axes of a parameter: its components, and rows and columns of one."""

    components: Axis
    rows: Axis
    columns: Axis

    @staticmethod
    def of(layout: Layout, weight: Tensor, grad: Tensor, momentum: Tensor) -> Axes:
        """The axes of ``weight`` and of its gradient and momentum, which may lie otherwise in memory."""
        shape = views.shape_of(weight, layout)
        seen = [views.components(tensor, layout) for tensor in (weight, grad, momentum)]
        dims: list[Dim] = [
            (size, *(tensor.stride(index) for tensor in seen))  # type: ignore[misc]
            for index, size in enumerate(seen[0].shape)
        ]
        parts: list[Axis] = []
        for size in (shape.count, shape.n, shape.p):
            end = next(end for end in range(len(dims) + 1) if math.prod(dim[0] for dim in dims[:end]) == size)
            # Dimensions of size 1 belong to the part before them, so that none is left over.
            while end < len(dims) and dims[end][0] == 1:
                end += 1
            parts.append(_merged(dims[:end]))
            dims = dims[end:]
        return Axes(*parts)

    def transposed(self) -> Axes:
        """Rows and columns exchanged."""
        return Axes(self.components, self.columns, self.rows)

    def as_vectors(self) -> Axes:
        """Every component one column, in the order of memory."""
        return Axes(self.components, _merged([*self.rows.dims, *self.columns.dims]).reordered(), Axis(((1, 0, 0, 0),)))

    def as_columns(self) -> Axes:
        """Every column a vector, its elements in the order of memory."""
        return Axes(self.components, self.rows.reordered(), self.columns)

    def numbers(self) -> list[int]:
        return [*self.components.numbers(), *self.rows.numbers(), *self.columns.numbers()]

    @property
    def parts(self) -> tuple[Axis, Axis, Axis]:
        return self.components, self.rows, self.columns

    @property
    def same(self) -> bool:
        """Whether the three tensors have the same strides."""
        return all(dim[1] == dim[2] == dim[3] for part in self.parts for dim in part.dims)
