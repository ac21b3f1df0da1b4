"""From a plan to launches: which kernel takes which group in what pieces, and the tables that it reads.

Everything here depends on the plan and on how tensors lie in memory, not on what they hold; it is done once and kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from manifold_kernels import views
from manifold_kernels.manifolds import RETRACTIONS, Euclidean, Grassmann, Oblique, ScaleInvariant, Sphere, Stiefel
from manifold_kernels.plan import GROUP_COLUMNS, HYPER_COLUMNS, RULES, STEP_SIZES, Plan
from manifold_kernels.triton import elements, grassmann, lanes, matrices, scale_invariant, tables, vectors
from manifold_kernels.triton.addressing import AXIS_COLUMNS
from manifold_kernels.triton.axes import Axes
from manifold_kernels.triton.registry import ARCS, LANE_MANIFOLDS, MATRIX_RETRACTIONS
from manifold_kernels.triton.support import interpreted, unsupported

if (_reason := unsupported()) is not None:
    raise ImportError(f"manifold_kernels.triton: {_reason}")

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
RETRACTION_NAMES = {code: name for name, code in RETRACTIONS.items()}

#: Triton decides when kernels are defined, as they are by now, whether they are compiled or interpreted.
INTERPRETED = interpreted()
#: Elements of a program's tile. The interpreter pays by the program, a machine by the register.
TILE = 2**16 if INTERPRETED else 4096
#: Threads of a warp; AMD's GPUs for computing have 64.
WARP = 64 if torch.version.hip else 32
#: Lanes of a program whose lanes are matrices: one to each thread of four warps, or four to each thread of one.
LANES = 1024 if INTERPRETED else 4 * WARP
#: The largest matrices that are unrolled on a lane: vectors and columns, Stiefel by Givens, Stiefel otherwise.
UNROLLED, UNROLLED_QR, UNROLLED_OTHERS = 32, 5, 4
#: The most bytes of a Stiefel matrix that a program takes, padded and as it is computed with, and of the n x n matrices
#: of Cayley's transform and the exponential, which have more of them; torch's linear algebra takes larger ones.
BYTES, BYTES_TURNING = 2**16, 2**14
#: The longest step in units of s, by the type that is computed in. Of a longer one rounding leaves the direction alone
#: (vectors), or less than the part that is cut (matrices: Gram matrices are to keep half of the digits).
LONGEST_VECTOR = {torch.float32: 2.0**30, torch.float64: 2.0**60}
LONGEST_MATRIX = {torch.float32: 2.0**12, torch.float64: 2.0**27}
LONGEST_TURN = 64.0


@dataclass(frozen=True)
class Kernel:
    """A kernel with its constants: what is compiled."""

    function: Any
    constants: tuple[tuple[str, Any], ...]
    warps: int

    def with_mode(self, mode: tl.constexpr) -> Kernel:
        return Kernel(self.function, (*self.constants, ("MODE", mode.value)), self.warps)


@dataclass(frozen=True)
class Launch:
    """One launch: a kernel over pieces of groups (``tiles``), or over the rows of groups to be summed."""

    kernel: Kernel
    tiles: Tensor
    sums: bool = False

    @property
    def programs(self) -> int:
        return self.tiles.shape[0]


@dataclass(frozen=True)
class Member:
    """One group and its tensors."""

    at: Mapping[str, int]
    row: int
    weight: Tensor
    grad: Tensor
    momentum: Tensor
    buffered: bool
    nesterov: bool
    divided: bool
    decay: bool
    norms: bool
    first_norm: int

    @property
    def individual(self) -> bool:
        return bool(self.at["individual"])

    @property
    def bounded(self) -> bool:
        return self.at["step_size"] == STEP_SIZES["general"] and self.at["rule"] == RULES["fg_sgd"]

    @property
    def has_norm(self) -> bool:
        return self.norms and self.at["rule"] == RULES["fg_sgd"]

    @property
    def compute(self) -> torch.dtype:
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def aligned(self) -> bool:
        tensors = (self.weight, self.grad, self.momentum) if self.buffered else (self.weight, self.grad)
        return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)

    def layout(self) -> views.Layout:
        view = {code: name for name, code in views.VIEWS.items()}[self.at["view"]]
        return views.Layout(view, self.at["out_dim"], self.at["channel_groups"], self.at["rows"])


@dataclass(frozen=True)
class Schedule:
    """The launches of a step in order, with the tables that do not change."""

    launches: list[Launch]
    library: list[Member]  # groups that torch's linear algebra steps
    axes: Tensor
    groups: Tensor
    components: Tensor
    partials: Tensor
    totals: Tensor


@dataclass
class _Piece:
    """A group's way through a kernel."""

    kernel: Kernel
    axes: Axes
    size: int
    per_tile: int
    columns: int = 1
    per_column_tile: int = 1


@dataclass
class _Builder:
    """Collects the pieces of all groups."""

    rows: list[list[int]] = field(default_factory=list)
    axes: list[list[int]] = field(default_factory=list)
    alone: dict[Kernel, list[list[int]]] = field(default_factory=dict)
    several: dict[Kernel, list[list[int]]] = field(default_factory=dict)
    summed: list[list[int]] = field(default_factory=list)
    partials: int = 0


def power_above(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return int(triton.next_power_of_2(max(number, 1)))


def schedule(
    plan: Plan,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    momenta: Sequence[Tensor],
    hyper: Tensor,
    norms: bool,
    amp: bool,
) -> Schedule:
    """The launches for one step of ``plan``; tensors are looked at for shapes, strides, types and alignment only.

    ``amp``: the step has a ``grad_scale`` or ``found_inf``.
    """
    device = params[0].device
    builder = _Builder()
    library: list[Member] = []
    entry = 0
    table = hyper.tolist()
    for row, values in enumerate(plan.groups.tolist()):
        at = dict(zip(GROUP_COLUMNS, values, strict=True))
        builder.rows.append([at["hyper"], at["first"], at["scale"], at["scale_stride"], entry, builder.partials, 0])
        first_norm, entry = entry, entry + (at["count"] if at["individual"] else 1)
        grad, weight = grads[at["parameter"]], params[at["parameter"]]
        if grad is None or at["count"] == 0 or weight.numel() == 0:
            continue
        member = _member(at, row, weight, grad, momenta[at["parameter"]], table[at["hyper"]], norms, first_norm, amp)
        piece = _piece(member)
        if piece is None:
            library.append(member)
        else:
            _cut(builder, member, piece)

    def numbers(rows: list[list[int]], width: int) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, width).to(device)

    launches = []
    width = len(tables.TILE_COLUMNS)
    several = {kernel: numbers(tiles, width) for kernel, tiles in builder.several.items()}
    launches += [Launch(kernel.with_mode(tables.MEASURE), tiles) for kernel, tiles in several.items()]
    if builder.summed:
        launches.append(Launch(SUM, numbers(builder.summed, 1), sums=True))
    launches += [Launch(kernel.with_mode(tables.STEP), tiles) for kernel, tiles in several.items()]
    for kernel, tiles in builder.alone.items():
        launches.append(Launch(kernel.with_mode(tables.ALONE), numbers(tiles, width)))
    return Schedule(
        launches,
        library,
        numbers(builder.axes, 3 * AXIS_COLUMNS),
        numbers(builder.rows, len(tables.GROUP_COLUMNS)),
        plan.components.to(device),
        torch.empty(builder.partials, dtype=torch.float64, device=device),
        torch.empty(len(builder.rows), dtype=torch.float64, device=device),
    )


def _member(
    at: Mapping[str, int],
    row: int,
    weight: Tensor,
    grad: Tensor,
    momentum: Tensor,
    values: list[float],
    norms: bool,
    first_norm: int,
    amp: bool,
) -> Member:
    h = dict(zip(HYPER_COLUMNS, values, strict=True))
    euclidean = at["manifold"] == Euclidean.code
    sgd = euclidean or at["rule"] == RULES["fg_sgd"]
    buffered = h["momentum"] != 0 or (at["rule"] == RULES["adam_g"] and not euclidean)
    return Member(
        at,
        row,
        weight,
        grad,
        momentum if buffered else weight,
        buffered,
        bool(h["nesterov"]) and sgd and buffered,
        amp or bool(h["maximize"]),
        bool(h["weight_decay"]) and (euclidean or at["manifold"] == ScaleInvariant.code),
        norms,
        first_norm,
    )


def _piece(of: Member) -> _Piece | None:
    """The kernel for a group, or ``None`` where torch's linear algebra takes it."""
    shape = views.shape_of(of.weight, of.layout())
    axes = Axes.of(of.layout(), of.weight, of.grad, of.momentum)
    manifold, retraction = of.at["manifold"], RETRACTION_NAMES[of.at["retraction"]]
    count, small = of.at["count"], shape.n * shape.p <= UNROLLED
    longest = LONGEST_VECTOR[of.compute]
    if manifold == ScaleInvariant.code:
        return _rows(of, scale_invariant.step, axes, shape.n, {})
    if manifold == Grassmann.code:
        adaptive = of.at["rule"] == RULES["adam_g"]
        return _rows(of, grassmann.step, axes, shape.n, {"ADAPTIVE": adaptive})
    if manifold == Euclidean.code:
        if shape.count == 1 or (not of.bounded and not (of.has_norm and of.individual)):
            return _elements(of, axes, shape.n * shape.p, shape.count == 1)
        if small:
            return _lanes(of, axes, shape.n, shape.p, "add", 0.0)
        return _vectors(of, axes.as_vectors(), shape.n * shape.p, 1, "add", 0.0, count)
    if manifold == Stiefel.code:
        if shape.n < shape.p:
            axes, n, p = axes.transposed(), shape.p, shape.n
        else:
            n, p = shape.n, shape.p
        turns = retraction in ("cayley", "exp")
        if p == 1:
            arc = retraction if turns else "projection"
            return _vectors(of, axes.as_vectors(), n, 1, arc, LONGEST_TURN if turns else longest, count)
        if n <= (UNROLLED_QR if retraction == "qr" else UNROLLED_OTHERS):
            limit = LONGEST_TURN if turns else longest if retraction == "qr" else LONGEST_MATRIX[of.compute]
            return _lanes(of, axes, n, p, retraction, limit)
        # Cayley's transform and the exponential have matrices of n x n, or more of those of n x p.
        size = power_above(n) * power_above(n if turns else p) * of.compute.itemsize
        if size <= (BYTES_TURNING if turns else BYTES):
            return _matrices(of, axes, n, p, retraction, size, LONGEST_TURN if turns else LONGEST_MATRIX[of.compute])
        return None
    if small:
        return _lanes(of, axes, shape.n, shape.p, retraction, longest)
    if manifold == Sphere.code or shape.p == 1:
        return _vectors(of, axes.as_vectors(), shape.n * shape.p, 1, retraction, longest, count)
    assert manifold == Oblique.code
    return _vectors(of, axes.as_columns(), shape.n, shape.p, retraction, longest, count)


def _shared(of: Member, axes: Axes, runs: Sequence[int]) -> dict[str, Any]:
    """The constants that all kernels have: types, options, and what is known of addresses."""
    run, align = _run(of, axes, runs)
    return {
        "STORE": _TYPES[of.weight.dtype],
        "COMPUTE": _TYPES[of.compute],
        "BUFFERED": of.buffered,
        "DIVIDED": of.divided,
        "LISTED": bool(of.at["listed"]),
        "SAME": axes.same,
        "RUN": run,
        "ALIGN": align,
        "DIMS_0": len(axes.components.dims),
        "DIMS_1": len(axes.rows.dims),
    }


def _sgd(of: Member, axes: Axes) -> dict[str, Any]:
    """The constants of kernels for FG-SGD on components."""
    return {
        "NESTEROV": of.nesterov,
        "DECAY": of.decay,
        "THROUGH": of.at["manifold"] == Euclidean.code and not of.bounded,
        "INDIVIDUAL": of.individual,
        "BOUNDED": of.bounded,
        "NORMS": of.has_norm,
        "DIMS_2": len(axes.columns.dims),
    }


def _run(of: Member, axes: Axes, runs: Sequence[int]) -> tuple[int, int]:
    """The first axis of ``runs`` that 16-byte loads may run along, and the numbers in 16 bytes; -1 and 1 for none."""
    align = 16 // of.weight.dtype.itemsize
    for run in runs:
        axis = axes.parts[run]
        if not (of.aligned and axis.contiguous and axis.dims[-1][0] % align == 0):
            continue
        others = [dim for part in axes.parts for dim in part.dims if not (part is axis and dim is axis.dims[-1])]
        if any(stride % align for dim in others for stride in dim[1:]):
            continue
        if run == 0 and (of.at["listed"] or of.at["first"] % align or of.at["count"] % align):
            continue
        return run, align
    return -1, 1


def _lanes(of: Member, axes: Axes, n: int, p: int, retraction: str, longest: float) -> _Piece:
    project, retract = LANE_MANIFOLDS[of.at["manifold"], retraction]
    shared = _shared(of, axes, [0])
    wide = of.weight.dtype == torch.float64
    # 16 bytes a lane at a time where matrices are small enough for several in a thread's registers.
    vectorised = shared["RUN"] == 0 and n * p <= 9 and not wide
    if not vectorised:
        shared |= {"RUN": -1, "ALIGN": 1}
    constants = {
        "project": project,
        "retract": retract,
        "N": n,
        "P": p,
        "LONGEST": longest,
        **shared,
        **_sgd(of, axes),
        "LANES": LANES,
    }
    # Fewer matrices to a thread in 16 bits: what is computed in is wider than what is loaded.
    warps = 4 if not vectorised else 1 if of.weight.dtype.itemsize == 4 else 2
    kernel = Kernel(lanes.step, tuple(constants.items()), warps)
    return _Piece(kernel, axes, of.at["count"], LANES)


def _vectors(of: Member, axes: Axes, n: int, p: int, arc: str, longest: float, count: int) -> _Piece:
    split = count == 1 and p > 1
    columns = power_above(p)
    if split:
        columns = max(1, min(columns, TILE // min(power_above(n), TILE)))
    block = min(power_above(n), max(TILE // columns, 1))
    per_tile = min(power_above(count), max(TILE // (columns * block), 1))
    shared = _shared(of, axes, [1, 0, 2])
    constants = {
        "arc": ARCS[arc],
        "N": n,
        "P": p,
        "LONGEST": longest,
        **shared,
        **_sgd(of, axes),
        "FLAT": of.at["manifold"] == Euclidean.code,
        "SPLIT": split,
        "LANES": per_tile,
        "COLUMNS": columns,
        "BLOCK": block,
    }
    kernel = Kernel(vectors.step, tuple(constants.items()), warps_of(per_tile * columns * block, 16))
    return _Piece(kernel, axes, count, per_tile, p if split else 1, columns if split else 1)


def _rows(of: Member, function: Any, axes: Axes, n: int, more: dict[str, Any]) -> _Piece:
    axes, count = axes.as_vectors(), of.at["count"]
    block = min(power_above(n), TILE)
    per_tile = min(power_above(count), max(TILE // block, 1))
    shared = _shared(of, axes, [1])
    constants = {"N": n, **shared, **more, "LANES": per_tile, "BLOCK": block}
    if function is scale_invariant.step:
        constants["DECAY"] = of.decay
    return _Piece(Kernel(function, tuple(constants.items()), warps_of(2 * per_tile * block, 16)), axes, count, per_tile)


def _elements(of: Member, axes: Axes, size: int, whole: bool) -> _Piece:
    axes = axes.as_vectors()
    block = min(power_above(of.at["count"] * size), TILE if INTERPRETED else 1024)
    sgd = _sgd(of, axes)
    constants = {
        "SIZE": size,
        **_shared(of, axes, [1]),
        **{name: sgd[name] for name in ("NESTEROV", "DECAY", "BOUNDED", "NORMS")},
        "WHOLE": whole,
        "BLOCK": block,
    }
    if whole:
        constants["SIZE"] = 0  # of no use, and not to be compiled for
    return _Piece(Kernel(elements.step, tuple(constants.items()), 4), axes, of.at["count"] * size, block)


def _matrices(of: Member, axes: Axes, n: int, p: int, retraction: str, size: int, longest: float) -> _Piece:
    """``size``: the bytes of a matrix in registers."""
    per_tile = min(power_above(of.at["count"]), max((2**18 if INTERPRETED else 2**12) // size, 1))
    constants = {
        "retract": MATRIX_RETRACTIONS[retraction],
        "N": n,
        "P": p,
        "LONGEST": longest,
        **_shared(of, axes, [2, 1]),
        **{name: value for name, value in _sgd(of, axes).items() if name not in ("DECAY", "THROUGH")},
        "LANES": per_tile,
        "ROWS": power_above(n),
        "COLUMNS": power_above(p),
    }
    kernel = Kernel(matrices.step, tuple(constants.items()), warps_of(per_tile * size, 32))
    return _Piece(kernel, axes, of.at["count"], per_tile)


def warps_of(work: int, share: int) -> int:
    """The warps of a program whose threads take ``share`` of its ``work`` each, at most 512 of them."""
    return min(max(work // (share * WARP), 1), 512 // WARP)


def _cut(builder: _Builder, of: Member, piece: _Piece) -> None:
    """The pieces of a group, and whether its norm has to be known before it can step."""
    tiles = list(_tiles(piece))
    # Pieces of one component must agree whether it moves, those of a group on their norm.
    owns = of.individual and of.at["count"] > 1
    measured = len(tiles) > 1 and not owns and (of.bounded or of.has_norm or piece.columns > 1)
    builder.axes.append(piece.axes.numbers())
    row = of.row
    for index, (first, count, column) in enumerate(tiles):
        tile = [
            of.at["parameter"],
            len(builder.axes) - 1,
            row,
            first,
            count,
            column,
            builder.partials + index,
            index == 0,
        ]
        (builder.several if measured else builder.alone).setdefault(piece.kernel, []).append([int(n) for n in tile])
    if measured:
        builder.rows[row][-2:] = [builder.partials, len(tiles)]
        builder.summed.append([row])
        builder.partials += len(tiles)


def _tiles(piece: _Piece) -> Iterator[tuple[int, int, int]]:
    """First, count and column of a group's pieces."""
    for first in range(0, piece.size, piece.per_tile):
        for column in range(0, piece.columns, piece.per_column_tile):
            yield first, min(piece.per_tile, piece.size - first), column


def _sum_kernel() -> Kernel:
    from manifold_kernels.triton import step_size

    return Kernel(step_size.total, (("BLOCK", 1024),), 4)


SUM = _sum_kernel()
