"""Where elements lie: from an index along an axis of the components to offsets in weight, gradient and momentum.

A parameter's elements are addressed along three axes: its components, and rows and columns of one component. An axis
is up to :data:`DIMS` dimensions of sizes and strides (:mod:`~manifold_kernels.triton.axes` writes them).
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Dimensions of an axis, and the numbers that describe one: size, and strides of weight, gradient and momentum.
DIMS = 8
DIM_COLUMNS = 4
AXIS_COLUMNS = DIMS * DIM_COLUMNS

_AXIS = tl.constexpr(AXIS_COLUMNS)
_DIM = tl.constexpr(DIM_COLUMNS)


@triton.jit
def address(at, STORE: tl.constexpr, ALIGNED: tl.constexpr):
    """A tensor's memory, known to begin at a multiple of 16 bytes where ``ALIGNED``."""
    pointer = tl.load(at).to(tl.pointer_type(STORE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _stride(at, WHICH: tl.constexpr, UNIT: tl.constexpr, ALIGN: tl.constexpr):
    if UNIT:
        return 1
    else:
        return tl.multiple_of(tl.load(at + 1 + WHICH), ALIGN)


@triton.jit
def offsets(
    axes, AXIS: tl.constexpr, index, DIMS_USED: tl.constexpr, SAME: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr
):
    """Offsets of ``index`` along an axis in weight, gradient and momentum.

    ``RUN`` is the axis whose last dimension is contiguous in memory (-1: none); then all other strides and the size of
    that dimension are multiples of ``ALIGN``, as the compiler must know to load 16 bytes at a time. ``SAME``: the three
    tensors have the same strides.
    """
    w = index * 0
    g = index * 0
    m = index * 0
    for dim in tl.static_range(DIMS_USED - 1, -1, -1):
        at = axes + (AXIS * _AXIS + dim * _DIM)
        coordinate = index
        if dim > 0:
            size = tl.load(at).to(index.dtype)
            if RUN == AXIS and dim == DIMS_USED - 1:
                size = tl.multiple_of(size, ALIGN)
            coordinate = index % size
            index = index // size
        coordinate = coordinate.to(tl.int64)
        w += coordinate * _stride(at, 0, RUN == AXIS and dim == DIMS_USED - 1, ALIGN)
        if not SAME:
            g += coordinate * _stride(at, 1, RUN == AXIS and dim == DIMS_USED - 1, ALIGN)
            m += coordinate * _stride(at, 2, RUN == AXIS and dim == DIMS_USED - 1, ALIGN)
    if SAME:
        return w, w, w
    else:
        return w, g, m
