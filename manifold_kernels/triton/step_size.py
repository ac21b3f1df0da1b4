"""Norms of groups and the step sizes that follow from them, in float64: R^2 of float32 gradients leaves float32."""

from __future__ import annotations

import triton
import triton.language as tl

from manifold_kernels.triton.tables import (
    CURVATURE,
    GROUP_NORM,
    GROUP_PARTIAL,
    GROUP_PARTIALS,
    GROUP_WIDTH,
    LR,
    RHO,
    STEP,
    TILE_GROUP,
    TILE_LEADS,
)


@triton.jit
def factor(square, h):
    """``tau = max(1, R max(2 rho + R, sqrt(1 + c (rho + R))))`` ([FG] Eq. 5) from R^2."""
    r = tl.minimum(tl.sqrt(square), 1e150)  # tau is infinite anyway, but nothing may become 0 * inf
    rho, curvature = tl.load(h + RHO), tl.load(h + CURVATURE)
    return tl.maximum(r * tl.maximum(2.0 * rho + r, tl.sqrt(1.0 + curvature * (rho + r))), 1.0)


@triton.jit
def norm_square(square, tile, totals, OWN: tl.constexpr, MODE: tl.constexpr):
    """R^2 for components with ``square``, 0 where they do not step: their own, their group's here or from all of it."""
    if MODE == STEP:
        return tl.load(totals + tl.load(tile + TILE_GROUP))
    elif OWN:
        return square
    else:
        return tl.sum(square, 0)


@triton.jit
def rate(square, h, BOUNDED: tl.constexpr):
    """``lr/tau``."""
    lr = tl.load(h + LR)
    if BOUNDED:
        return lr / factor(square, h)
    else:
        return lr


@triton.jit
def write_norm(square, here, group, norms, THROUGH: tl.constexpr):
    """The group's R to its place, where ``here``. Without a component that steps it is 0, or NaN where NaN was written
    ``THROUGH``."""
    nothing = float("nan") if THROUGH else 0.0
    value = tl.where(square == square, tl.sqrt(square), nothing)
    tl.store(norms + tl.load(group + GROUP_NORM), value, mask=here)


@triton.jit
def write_norms(square, ok, position, inside, tile, group, norms, INDIVIDUAL: tl.constexpr, THROUGH: tl.constexpr):
    """R of the group, or of every component, NaN for those that do not step."""
    if INDIVIDUAL:
        at = norms + tl.load(group + GROUP_NORM) + position
        tl.store(at, tl.where(ok & (square == square), tl.sqrt(square), float("nan")), mask=inside)
    else:
        write_norm(square, tl.load(tile + TILE_LEADS) != 0, group, norms, THROUGH)


@triton.jit
def total(groups, partials, totals, summed, BLOCK: tl.constexpr):
    """The sum of a group's partial sums, always in the same order; one program a group."""
    row = tl.load(summed + tl.program_id(0))
    group = groups + row * GROUP_WIDTH
    first, count = tl.load(group + GROUP_PARTIAL), tl.load(group + GROUP_PARTIALS)
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    start = 0
    while start < count:  # the interpreter has no range to a number that it has loaded
        sums += tl.load(partials + first + start + lane, mask=start + lane < count, other=0.0)
        start += BLOCK
    tl.store(totals + row, tl.sum(sums, 0))
