"""The compiled kernels beside the reference: both step from the same numbers and are compared after every step.

The reference computes in float64 and rounds once, so that what is compared are the kernels' own roundings. Steps start
anew from the kernels' state each time: errors do not add up, and a bound holds for the tenth step as for the first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from stepping import DEFAULTS, Run, copy, group, hyper_table, place_, start
from torch import Tensor

from manifold_kernels import reference, views
from manifold_kernels.manifolds import BY_NAME, RETRACTIONS, Euclidean, Grassmann, Manifold, ScaleInvariant, Stiefel
from manifold_kernels.ops import Step
from manifold_kernels.plan import GROUP_COLUMNS, RULES, STEP_SIZES, Group, Plan
from manifold_kernels.reference import sphere
from manifold_kernels.reference.registry import GEOMETRIES
from manifold_kernels.views import Layout

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: Every manifold that FG-SGD steps on, with each of its retractions, and the rules of the others.
FG = [(name, retraction) for name in ("sphere", "oblique", "stiefel") for retraction in BY_NAME[name].retractions]
VECTOR_RULES = [("scale_invariant", "psi_sgd"), ("grassmann", "sgd_g"), ("grassmann", "adam_g")]

#: Options of the momentum, every one of which takes another path through a kernel.
MOMENTA: list[dict[str, float]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": 1},
    {"momentum": 0.9, "dampening": 0.1, "maximize": 1},
    {"maximize": 1},
    {"momentum": 0.5, "nesterov": 1, "maximize": 1},
]

#: Bounds of numbers that are zero.
TINY = 1e-300

ARRANGEMENTS = ("contiguous", "channels_last", "transposed", "gaps", "misaligned", "strided")


def name_of(value: object) -> str | None:
    """Test names without ``torch.``"""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def compiled(*args: object) -> None:
    torch.ops.manifold_kernels.step_(*args)


def arranged(tensor: Tensor, how: str) -> Tensor:
    """The same numbers, lying otherwise in memory: always a tensor of its own."""
    dims = list(range(tensor.dim()))
    if how == "contiguous":
        return tensor.clone(memory_format=torch.contiguous_format)
    if how in ("channels_last", "transposed"):
        order = [0, *dims[2:], 1] if how == "channels_last" and len(dims) > 1 else dims[::-1]
        back = [order.index(dim) for dim in dims]
        return tensor.permute(order).clone(memory_format=torch.contiguous_format).permute(back)
    if how == "misaligned":
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
        return room.view(tensor.shape).copy_(tensor)
    if how == "gaps":
        room = torch.empty([size + 1 for size in tensor.shape], dtype=tensor.dtype)
        return room[tuple(slice(1, None) for _ in dims)].copy_(tensor)
    assert how == "strided"  # every second number of the last dimension, rows with room between them
    room = torch.empty([*tensor.shape[:-1], 2 * tensor.shape[-1] + 3], dtype=tensor.dtype)
    return room[..., : 2 * tensor.shape[-1] : 2].copy_(tensor)


@dataclass
class Case:
    """One weight with its groups, and how its gradients look."""

    weight: Tensor
    groups: list[Group]
    hyper: dict[str, float] = field(default_factory=dict)
    grad_size: float = 1.0
    grad_arrangement: str = "contiguous"
    seed: int = 0

    def gradient(self, generator: torch.Generator) -> Tensor:
        shape = self.weight.shape
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * self.grad_size
        drawn = drawn.to(self.weight.dtype)
        if self.grad_arrangement == "expanded":
            return drawn[:1].expand(shape)
        return arranged(drawn, self.grad_arrangement)


def one_group(
    of: str,
    option: str,
    shape: Sequence[int],
    layout: Layout,
    *,
    dtype: torch.dtype = torch.float32,
    scale: float | str = 1.0,
    arrangement: str = "contiguous",
    seed: int = 0,
    individual: bool = False,
    step_size: str = "none",
    hyper: Mapping[str, float] | None = None,
    **rest: object,
) -> Case:
    """A case whose weight lies in one group; ``option`` is the retraction, or the rule where there is only one.

    A ``scale`` of "each" gives every component its own; ``rest`` are fields of :class:`Case`.
    """
    manifold = BY_NAME[of]()
    vector = isinstance(manifold, (ScaleInvariant, Grassmann))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(list(shape), generator=generator, dtype=torch.float64)
    count = views.shape_of(weight, layout).count
    first, last = (0.5, 2.0) if scale == "each" else (float(scale), float(scale))
    scales = torch.linspace(first, last, count, dtype=torch.float64)
    weight = on_manifold(manifold, weight, layout, scales).to(dtype)
    row = group(
        manifold,
        layout,
        rule=option if vector else None,
        retraction=None if vector else option,
        scale=scales if scale == "each" else float(scale),
        individual=individual,
        step_size=step_size,
    )
    return Case(arranged(weight, arrangement), [row], dict(hyper or {}), seed=seed, **rest)


def on_manifold(of: Manifold, weight: Tensor, layout: Layout, scales: Tensor) -> Tensor:
    """``weight``, its components moved onto manifolds of their own scales."""
    place_(of, weight, layout, 1.0)
    batch = views.matrices(weight, layout) * scales.reshape(-1, 1, 1).to(weight.dtype)
    views.write_matrices(weight, layout, batch)
    return weight


def clone(run: Run) -> Run:
    """A copy to step from."""
    return Run(
        [copy(p) for p in run.params],
        [copy(m) for m in run.momenta],
        [v.clone() for v in run.variances],
        run.steps.clone(),
        run.nonfinite.clone(),
    )


def call(
    step: Step, run: Run, grads: list[Tensor | None], plan: Plan, table: Tensor, norms: Tensor | None = None
) -> None:
    """One step of ``run``, in place."""
    step(
        run.params,
        grads,
        run.momenta,
        run.variances,
        run.steps,
        run.nonfinite,
        plan.groups,
        plan.components,
        plan.scales,
        table,
        norms,
    )


def norm_counts(plan: Plan) -> list[int]:
    """Entries of R for every row: one, and one for each component where ``individual``."""
    return torch.where(plan.column("individual") == 1, plan.column("count"), 1).tolist()


def assert_same_bits(run: Run, other: Run) -> None:
    """Everything that a step writes is the same to the bit, NaN included."""
    for name, value in vars(run).items():
        pairs = (
            zip(value, getattr(other, name), strict=True) if isinstance(value, list) else [(value, vars(other)[name])]
        )
        assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs), name


def check(case: Case, steps: int = 3, step: Step = compiled) -> float:
    """Step both backends and compare weights, states and R; returns the largest error in units of its bound.

    R is asked for in every step; the last one is taken without it, too.
    """
    run = start([case.weight], case.groups, [case.hyper], fill=math.nan)
    run.params[0] = case.weight
    plan, table = Plan.build(case.groups, run.params), hyper_table([case.hyper])
    generator = torch.Generator().manual_seed(case.seed + 1)
    worst = 0.0
    for number in range(steps):
        grad = case.gradient(generator)
        before, expected, plain = clone(run), clone(run), clone(run)
        norms, norms_expected = (torch.zeros(sum(norm_counts(plan)), dtype=torch.float64) for _ in range(2))
        call(reference.step_, expected, [grad], plan, table, norms_expected)
        call(step, run, [grad], plan, table, norms)
        if number == steps - 1:
            call(step, plain, [grad], plan, table)
            assert_same_bits(run, plain)
        assert torch.equal(run.steps, expected.steps) and torch.equal(run.nonfinite, expected.nonfinite)
        each_norm = zip(norms.split(norm_counts(plan)), norms_expected.split(norm_counts(plan)), strict=True)
        for row, (r, r_expected) in enumerate(each_norm):
            worst = max(worst, compare(case, row, plan, before, grad, run, expected, r, r_expected))
    assert worst <= 1, f"error {worst:.3g} of its bound"
    return worst


def check_gaps(arrangement: str, step: Step = compiled) -> None:
    """A step of weights with room between their elements (``gaps``, ``strided``) leaves what lies there as it is."""
    kinds = [("stiefel", "kernel"), ("sphere", "filter"), ("euclidean", "flat"), ("oblique", "matrix")]
    for (of, view), dtype in itertools.product(kinds, DTYPES):
        room = torch.full((7, 19, 4, 9), 7.0, dtype=dtype)
        inside = room[1:, 1:, 1:, 1:8:2] if arrangement == "strided" else room[1:-1, 1:-1, :3, 2:5]
        weight = torch.randn(inside.shape, dtype=torch.float64)
        if of != "euclidean":
            on_manifold(BY_NAME[of](), weight, Layout(view), torch.ones(views.shape_of(weight, Layout(view)).count))
        inside.copy_(weight)
        kept, mask = room.clone(), torch.ones_like(room, dtype=torch.bool)
        (mask[1:, 1:, 1:, 1:8:2] if arrangement == "strided" else mask[1:-1, 1:-1, :3, 2:5]).fill_(False)
        hyper = [{"momentum": 0.9}]
        run = start([inside], [group(of, view)], hyper)
        plan = Plan.build([group(of, view)], [inside])
        run.params[0] = inside
        call(step, run, [torch.randn_like(inside)], plan, hyper_table(hyper))
        assert torch.equal(room[mask], kept[mask])
        assert not torch.equal(room[~mask], kept[~mask])


def compare(
    case: Case,
    row: int,
    plan: Plan,
    before: Run,
    grad: Tensor,
    run: Run,
    expected: Run,
    r: Tensor,
    r_expected: Tensor,
) -> float:
    """The error of one group's step in units of its bound; what must agree to the bit is asserted."""
    layout, members = plan.layout(row), plan.members(row)
    at = dict(zip(GROUP_COLUMNS, plan.groups[row].tolist(), strict=True))

    def read(tensor: Tensor) -> Tensor:
        return views.matrices(tensor, layout)[members]

    h = {**DEFAULTS, **case.hyper}
    w, got, want, g = (read(t) for t in (before.params[0], run.params[0], expected.params[0], grad))
    buffered = run.momenta[0].numel() > 0
    euclidean = at["manifold"] == Euclidean.code
    bounded = at["rule"] == RULES["fg_sgd"] and at["step_size"] == STEP_SIZES["general"]
    if euclidean and not bounded:
        assert torch.equal(got, want)
    m = read(run.momenta[0]) if buffered else None
    m_want = read(expected.momenta[0]) if buffered else None
    if buffered and (euclidean or at["rule"] == RULES["fg_sgd"]):
        # Torch's formula, elementwise, on both sides.
        assert torch.equal(m, m_want)
    if at["rule"] != RULES["fg_sgd"]:
        assert bool(r.isnan().all()) and bool(r_expected.isnan().all())
        if euclidean:
            return 0.0
    s = plan.scale(row).reshape(-1, 1, 1).expand(members.numel(), 1, 1)
    if at["rule"] == RULES["fg_sgd"]:
        d = -g.double() if h["maximize"] else g.double()
        if euclidean:
            d = d + h["weight_decay"] * w.double()
        if buffered:
            d = d + h["momentum"] * m_want.double() if h["nesterov"] else m_want.double()
        worst = norm_error(at, w, d, r, r_expected)
        if not euclidean:
            return max(worst, fg_error(at, h, w, got, want, d, s))
        # The step size is rounded, and its product with d added to w and rounded: eps/2 each. R is a sum in float64,
        # whose roundings add up like a random walk and count for float64 only; tau goes with its square.
        roundings = 1 + (math.sqrt(d.numel()) / 4 if w.dtype == torch.float64 else 0)
        moved = got.double() - w.double()
        bound = stored(want) + arithmetic(w.dtype) * (want.double().abs() + roundings * moved.abs())
        return max(worst, ratio(got, want, bound)) if bounded else worst
    m_old = read(before.momenta[0]) if buffered and int(before.steps[0]) else None
    if at["rule"] == RULES["psi_sgd"]:
        return psi_error(h, w, g, m_old, got, want, m, m_want)
    worst = grassmann_error(w, g, m_old, got, want, m, m_want)
    if at["rule"] == RULES["adam_g"]:
        # A weighted mean of squared norms: four roundings, and twice the relative error of a norm.
        v, v_want = run.variances[0][members].reshape(-1, 1, 1), expected.variances[0][members].reshape(-1, 1, 1)
        worst = max(worst, ratio(v, v_want, (4 + 2 * cancellation(w, g)) * arithmetic(w.dtype) * v_want.double()))
    return worst


def arithmetic(dtype: torch.dtype) -> float:
    """eps of the type that is computed in."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def stored(want: Tensor) -> Tensor:
    """What another rounding to a 16-bit type may add: one unit in the last place; nothing for the wider types, whose
    rounding is one of the arithmetic's."""
    info = torch.finfo(want.dtype)
    if info.bits > 16:
        return torch.zeros_like(want, dtype=torch.float64)
    return torch.maximum(info.eps * want.double().abs(), torch.tensor(info.smallest_normal * info.eps))


def ratio(got: Tensor, want: Tensor, bound: Tensor) -> float:
    """The largest difference in units of its bound."""
    assert bool(got.isfinite().all())
    worst = ((got.double() - want.double()).abs() / bound).max() if got.numel() else torch.zeros(())
    assert not bool(worst.isnan())
    return float(worst)


def norm_error(at: Mapping[str, int], w: Tensor, d: Tensor, r: Tensor, r_expected: Tensor) -> float:
    """The error of R in units of its bound: the same NaN, and the roundings of xi (see ``fg_error``), which is of the
    size of d. Below 1e-19 squares vanish in float32."""
    known = ~r_expected.isnan()
    assert torch.equal(~r.isnan(), known)
    n, p = w.shape[-2:]
    roundings = 3 + (n + p) / 2 if at["manifold"] == Stiefel.code else 3 + math.sqrt(n * p) / 4
    length = d.flatten(1).norm(dim=1)
    size = length if at["individual"] else length.norm().reshape(1)
    bound = roundings * arithmetic(w.dtype) * size + 1e-19 * math.sqrt(n * p)
    return ratio(r[known], r_expected[known], bound[known])


def fg_error(
    at: Mapping[str, int], h: Mapping[str, float], w: Tensor, got: Tensor, want: Tensor, d: Tensor, s: Tensor
) -> float:
    """The error of a step ``W <- R_W(-(lr/tau) P_W(d))`` in units of its bound.

    Everything is of order ``1 + kappa`` in units of s, ``kappa = (lr/tau) ||d||/s`` the length of what is projected: a
    long radial part leaves its rounding errors behind. No retraction of a tangent vector magnifies errors (``W + V``
    has singular values >= s). So a bound counts the roundings of one element, ``eps/2`` each:

    * vectors: w/s, xi, step, sum, norm, quotient, product, about 6, and inner products of k terms, whose roundings add
      up like a random walk: ``3 + sqrt(k)/4`` eps.
    * Stiefel: an element passes through n + p rotations or products of n + p terms, ``3 + (n + p)/2`` eps.
    * The polar factor of the reference in float64 is made of a singular value decomposition, which for equal singular
      values is off by up to 23 eps on 3x3 matrices (measured against Newton's iteration in long double).
    """
    geometry = GEOMETRIES[at["manifold"]]
    n, p = w.shape[-2:]
    name = next(name for name, code in RETRACTIONS.items() if code == at["retraction"])
    length = geometry.proj(w.double(), d, s).flatten(1).norm(dim=1)
    norm = length if at["individual"] else length.norm().expand_as(length)
    tau = torch.ones_like(norm)
    if at["step_size"] == STEP_SIZES["general"]:
        factor = torch.maximum((2 * h["rho"] + norm).square(), 1 + h["curvature"] * (h["rho"] + norm))
        tau = (norm.square() * factor).clamp(min=1).sqrt()
    kappa = (h["lr"] / tau * d.flatten(1).norm(dim=1)).reshape(-1, 1, 1) / s
    roundings = 3 + math.sqrt(n * p) / 4
    if at["manifold"] == Stiefel.code:
        roundings = 3 + (n + p) / 2
        if name == "polar" and w.dtype == torch.float64:
            roundings += 40
    bound = stored(want) + roundings * arithmetic(w.dtype) * s * (1 + kappa)
    if name in ("cayley", "exp") and at["manifold"] == Stiefel.code:
        # The reference lands by one Newton-Schulz step, the kernels by a polar factor: they differ by the square of the
        # distance from the manifold, that of weights rounded to 16 bits.
        off = geometry.violation(w.double(), s).reshape(-1, 1, 1)
        bound = bound + 2 * s * (off * (1 + kappa)).square()
        if name == "exp" and len(w) == 1:
            # torch.linalg.matrix_exp of a single matrix in float64 is off by up to 3.3e-11 where its norm is near 0.05
            # (torch 2.13 against a Taylor series in long double; batches of two and more are right).
            bound = bound + 1e-10 * s
        if min(n, p) == 1:
            # The kernels take a single column for a sphere, where v is not projected a second time.
            bound = bound + s * off * kappa
    return ratio(got, want, bound)


def psi_error(
    h: Mapping[str, float],
    w: Tensor,
    g: Tensor,
    m_old: Tensor | None,
    got: Tensor,
    want: Tensor,
    m: Tensor | None,
    m_want: Tensor | None,
) -> float:
    """Errors of ``u <- rho u - lr ||w||^2 g`` and ``w <- (1 - k) w + u``: three roundings each beside those of the sum
    ``||w||^2`` in double, which count for float64 only; where the guard fires both are divided by the norm."""
    eps = arithmetic(w.dtype)
    square = w.double().square().sum((-2, -1), keepdim=True)
    pushed = (h["lr"] * square * g.double()).abs()
    carried = torch.zeros_like(pushed) if m_old is None else h["momentum"] * m_old.double().abs()
    roundings = 3 + (math.sqrt(w.shape[-2]) / 4 if w.dtype == torch.float64 else 0)
    u_bound = roundings * eps * (pushed + carried)
    w_bound = u_bound + roundings * eps * w.double().abs()
    if m is not None:
        # The stored u is what is added to w.
        w_bound = w_bound + stored(m_want)
        u_bound = u_bound + stored(m_want)
    worst = ratio(got, want, stored(want) + w_bound)
    return worst if m is None else max(worst, ratio(m, m_want, u_bound + TINY))


def cancellation(w: Tensor, g: Tensor) -> Tensor:
    """``||g||/||h||`` with ``h = g - w <w, g>/||w||^2``: what rounding errors of a nearly radial gradient grow by."""
    h = GEOMETRIES[Grassmann.code].proj(sphere.unit(w.double()), g.double(), 1.0)
    return (g.double().flatten(1).norm(dim=1) / h.flatten(1).norm(dim=1)).reshape(-1, 1, 1)


def grassmann_error(
    w: Tensor,
    g: Tensor,
    m_old: Tensor | None,
    got: Tensor,
    want: Tensor,
    m: Tensor | None,
    m_want: Tensor | None,
) -> float:
    """Errors on the unit sphere, in units of 1 for w and of the norm for its momentum: a dozen roundings of an element,
    in float64 those of four inner products, and what the clipped and normalised gradient brings along."""
    roundings = 2 + math.sqrt(w.shape[-2]) / 4 + cancellation(w, g)
    eps = arithmetic(w.dtype)
    worst = ratio(got, want, stored(want) + roundings * eps)
    if m is None or m_want is None:
        return worst
    # What was carried may nearly cancel what is added.
    size = m_want.double().flatten(1).norm(dim=1).reshape(-1, 1, 1)
    if m_old is not None:
        size = size + m_old.double().flatten(1).norm(dim=1).reshape(-1, 1, 1)
    return max(worst, ratio(m, m_want, stored(m_want) + roundings * eps * size + TINY))
