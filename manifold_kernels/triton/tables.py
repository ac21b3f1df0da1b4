"""Columns of the tables that kernels read, as constants that they may use."""

from __future__ import annotations

import triton.language as tl

from manifold_kernels import plan
from manifold_kernels.triton.addressing import AXIS_COLUMNS

#: One row for each program of a launch: a piece of a group.
TILE_COLUMNS: tuple[str, ...] = (
    "parameter",  # row of the table of parameters
    "axes",  # row of the table of axes
    "group",  # row of the table of groups
    "first",  # the first of its components, counted in the group; of its elements, for flat pieces
    "count",  # how many they are
    "column",  # its first column, where a component's columns are several pieces
    "partial",  # where its part of the group's sum goes
    "leads",  # 1 for the first piece of a group, which speaks for it
)

GROUP_COLUMNS: tuple[str, ...] = (
    "hyper",  # row of the table of hyper-parameters
    "first",  # the first of its components, or of its entries in the list of components
    "scale",  # where its scales begin
    "scale_stride",  # 1 where every component has its own
    "norm",  # where its norms go
    "partial",  # its partial sums are [partial, partial + partials)
    "partials",
)

#: The table of hyper-parameters, and AMP's numbers beside each row of it.
HYPER_COLUMNS: tuple[str, ...] = (
    *plan.HYPER_COLUMNS,
    "divisor",  # of the gradient: the scale, negative where the step goes uphill
    "found_inf",  # not 0: nothing is written
)

#: Addresses, which may change from step to step.
PARAMETER_COLUMNS: tuple[str, ...] = ("weight", "grad", "momentum", "variance", "steps")

TILE_WIDTH = tl.constexpr(len(TILE_COLUMNS))
GROUP_WIDTH = tl.constexpr(len(GROUP_COLUMNS))
PARAMETER_WIDTH = tl.constexpr(len(PARAMETER_COLUMNS))
AXES_WIDTH = tl.constexpr(3 * AXIS_COLUMNS)
HYPER_WIDTH = tl.constexpr(len(HYPER_COLUMNS))

TILE_PARAMETER = tl.constexpr(TILE_COLUMNS.index("parameter"))
TILE_AXES = tl.constexpr(TILE_COLUMNS.index("axes"))
TILE_GROUP = tl.constexpr(TILE_COLUMNS.index("group"))
TILE_FIRST = tl.constexpr(TILE_COLUMNS.index("first"))
TILE_COUNT = tl.constexpr(TILE_COLUMNS.index("count"))
TILE_COLUMN = tl.constexpr(TILE_COLUMNS.index("column"))
TILE_PARTIAL = tl.constexpr(TILE_COLUMNS.index("partial"))
TILE_LEADS = tl.constexpr(TILE_COLUMNS.index("leads"))

GROUP_HYPER = tl.constexpr(GROUP_COLUMNS.index("hyper"))
GROUP_FIRST = tl.constexpr(GROUP_COLUMNS.index("first"))
GROUP_SCALE = tl.constexpr(GROUP_COLUMNS.index("scale"))
GROUP_SCALE_STRIDE = tl.constexpr(GROUP_COLUMNS.index("scale_stride"))
GROUP_NORM = tl.constexpr(GROUP_COLUMNS.index("norm"))
GROUP_PARTIAL = tl.constexpr(GROUP_COLUMNS.index("partial"))
GROUP_PARTIALS = tl.constexpr(GROUP_COLUMNS.index("partials"))

WEIGHT = tl.constexpr(PARAMETER_COLUMNS.index("weight"))
GRAD = tl.constexpr(PARAMETER_COLUMNS.index("grad"))
MOMENTUM_BUFFER = tl.constexpr(PARAMETER_COLUMNS.index("momentum"))
VARIANCE = tl.constexpr(PARAMETER_COLUMNS.index("variance"))
STEPS = tl.constexpr(PARAMETER_COLUMNS.index("steps"))

LR = tl.constexpr(HYPER_COLUMNS.index("lr"))
MOMENTUM = tl.constexpr(HYPER_COLUMNS.index("momentum"))
DAMPENING = tl.constexpr(HYPER_COLUMNS.index("dampening"))
WEIGHT_DECAY = tl.constexpr(HYPER_COLUMNS.index("weight_decay"))
RHO = tl.constexpr(HYPER_COLUMNS.index("rho"))
CURVATURE = tl.constexpr(HYPER_COLUMNS.index("curvature"))
GUARD = tl.constexpr(HYPER_COLUMNS.index("guard"))
CLIP = tl.constexpr(HYPER_COLUMNS.index("clip"))
BETA2 = tl.constexpr(HYPER_COLUMNS.index("beta2"))
EPS = tl.constexpr(HYPER_COLUMNS.index("eps"))
DIVISOR = tl.constexpr(HYPER_COLUMNS.index("divisor"))
FOUND_INF = tl.constexpr(HYPER_COLUMNS.index("found_inf"))

#: What a launch does: all of its groups' steps, since every program owns its groups; the norms alone; the steps alone.
ALONE = tl.constexpr(0)
MEASURE = tl.constexpr(1)
STEP = tl.constexpr(2)
