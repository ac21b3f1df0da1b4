"""Every backend that is present against the reference in float64, and its ``functional.qr`` as LAPACK judges a QR.

A case is one step of one weight. Gradient and momentum are small multiples of powers of two, so that the momentum
``m/2 + g`` is exact in every type and all that is measured is the step behind it.

**Units.** The error of a component is ``||W - W_64||_F / (eps (||W_64||_F + ||W_64 - W_0||_F))`` with eps of the
storage type: 1 is about one unit in the last place.

**Limit.** Rounding to storage costs 1/2 (PSI rounds its buffer too: 1). The arithmetic has its own eps_c, of float32 or
float64: a sum of N products is off by at most lambda sqrt(N) eps_c/2 relative to the norms (Higham & Mary 2019; with
lambda = 4 it fails once in 1,500 sums, were it sharp). A step has three of them one behind the other, projection, norm
and retraction, and elementwise operations for less than 4 eps_c more: ``1/2 + (4 + 6 sqrt(N)) eps_c/eps``. A step is
about a third of a scale long, where retractions are Lipschitz with a constant near 1. For float64 the reference has
errors of the same size: twice the second term. Euclidean steps are two operations: ``1/2 + eps_c/eps``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_kernels import functional, ops, plan
from manifold_kernels.fit import frozen
from manifold_kernels.manifolds import (
    BY_NAME,
    RETRACTIONS,
    Euclidean,
    Grassmann,
    Manifold,
    ScaleInvariant,
    manifold,
)
from manifold_kernels.reference import step_ as reference_step
from manifold_kernels.reference.registry import GEOMETRIES
from manifold_kernels.triton import support
from manifold_kernels.views import Layout, matrices, shape_of, write_matrices

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "transposed", "expanded gradient")

#: Odd counts leave tails behind every vector width; wide and tall kernels, small and larger matrices.
SHAPES = ((7, 5, 3, 3), (16, 24, 3, 3), (4, 3, 5, 2), (3, 2, 2, 5), (6, 4, 1, 7), (33, 12), (12, 40))

SCALE = 0.5


@dataclass(frozen=True)
class Case:
    """One step of one weight."""

    rule: str
    manifold: str
    retraction: str
    view: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    individual: bool

    @property
    def label(self) -> str:
        """The line of the table that the case belongs to."""
        return f"{self.rule} {self.manifold} {self.retraction}"


@dataclass(frozen=True)
class Outcome:
    """The worst error of a case in units of rounding, and its limit."""

    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


def _views(of: Manifold, shape: tuple[int, ...]) -> tuple[str, ...]:
    if isinstance(of, Euclidean):
        return ("flat",)
    if isinstance(of, (ScaleInvariant, Grassmann)):
        return ("filter",)
    return ("kernel", "filter", "matrix") if len(shape) == 4 and min(shape[2:]) > 1 else ("filter", "matrix")


def _rules(of: Manifold) -> tuple[str, ...]:
    if isinstance(of, ScaleInvariant):
        return ("psi_sgd",)
    return ("sgd_g", "adam_g") if isinstance(of, Grassmann) else ("fg_sgd",)


def cases(quick: bool = False) -> Iterator[Case]:
    """The grid; ``quick`` leaves one float32 case for every rule, manifold, retraction and view."""
    for name, kind in BY_NAME.items():
        of = manifold(name)
        for rule, retraction, shape in itertools.product(_rules(of), kind.retractions, SHAPES[:1] if quick else SHAPES):
            for view in _views(of, shape):
                if frozen(of, shape_of(torch.empty(shape, device="meta"), Layout(view))) is not None:
                    continue
                for dtype, layout in itertools.product(DTYPES, LAYOUTS):
                    if layout == "channels_last" and len(shape) != 4:
                        continue
                    if quick and (dtype != torch.float32 or layout != "contiguous"):
                        continue
                    # One of the two for each case, so that both meet every manifold and view.
                    individual = len(layout) % 2 == 0
                    yield Case(rule, name, retraction, view, shape, dtype, layout, individual)


def spare() -> list[Case]:
    """One case of :func:`cases` for every rule, manifold, retraction, view and type, shapes and layouts in turn: for
    Triton's interpreter, which is a thousand times slower than what it stands in for."""
    alike: dict[tuple[str, str, torch.dtype], list[Case]] = {}
    for case in cases():
        alike.setdefault((case.label, case.view, case.dtype), []).append(case)
    # 7 has no factor in common with the numbers of shapes and layouts that most lines have.
    return [some[7 * turn % len(some)] for turn, some in enumerate(alike.values())]


def interpreted(backend: str) -> bool:
    """Whether ``backend`` is Triton's interpreter on the CPU."""
    return backend == "triton" and support.interpreted()


def device_of(backend: str) -> torch.device:
    """Where ``backend`` is checked: the current GPU where it is one for GPUs."""
    return torch.device("cuda" if backend in ("cuda", "triton") and not interpreted(backend) else "cpu")


def _stored(values: Tensor, layout: str) -> Tensor:
    """A copy of ``values`` with the strides that ``layout`` names."""
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    return values.contiguous().clone()


def _weight(case: Case, layout: Layout, generator: torch.Generator) -> Tensor:
    weight = torch.randn(case.shape, dtype=torch.float64, generator=generator)
    geometry = GEOMETRIES[BY_NAME[case.manifold].code]
    scale = 1.0 if case.manifold == Grassmann.name else SCALE
    write_matrices(weight, layout, geometry.projx(matrices(weight, layout), scale))
    return weight.to(case.dtype).double()


@dataclass(frozen=True)
class _State:
    """What a step writes."""

    weight: Tensor
    momentum: Tensor
    variance: Tensor
    steps: Tensor
    nonfinite: Tensor


def _step(step: ops.Step, table: plan.Plan, hyper: Tensor, state: _State, grad: Tensor) -> None:
    step(
        [state.weight],
        [grad],
        [state.momentum],
        [state.variance],
        state.steps,
        state.nonfinite,
        table.groups,
        table.components,
        table.scales,
        hyper,
    )


def _hyper(case: Case, direction: Tensor, count: int) -> Tensor:
    """Hyper-parameters that make the steps about a third of a scale long, in one row."""
    length = float(direction.norm())
    tau = 1.0 if case.individual else length * (2 + length)
    rate = tau * SCALE * math.sqrt(count) / (3 * length)
    values = {"lr": rate, "momentum": 0.5, "rho": 1.0, "guard": 1e4, "clip": 0.1, "beta2": 0.99, "eps": 1e-8}
    if case.manifold == ScaleInvariant.name:
        values |= {"lr": 0.01, "weight_decay": 5e-4}
    if case.manifold == Grassmann.name:
        values |= {"lr": 0.2, "momentum": 0.9}
    return torch.tensor([[values.get(name, 0.0) for name in plan.HYPER_COLUMNS]], dtype=torch.float64)


def _error(got: Tensor, wanted: Tensor, start: Tensor, layout: Layout, eps: float) -> float:
    got, wanted, start = (matrices(tensor.double(), layout).flatten(1) for tensor in (got, wanted, start))
    size = wanted.norm(dim=1) + (wanted - start).norm(dim=1)
    error = (got - wanted).norm(dim=1)
    # A value that is right to the last bit has no error, whatever its size.
    worst = float(torch.where(error == 0, 0.0, error / (eps * size)).max())
    return math.inf if math.isnan(worst) else worst


def run(case: Case, backend: str) -> Outcome:
    """The step of ``case`` by ``backend`` against the reference in float64."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout(case.view)
    weight = _weight(case, layout, generator)
    shape = shape_of(weight, layout)
    grad = torch.randint(-64, 65, case.shape, generator=generator).double() / 16
    momentum = torch.randint(-32, 33, case.shape, generator=generator).double() / 8
    if case.layout == "expanded gradient":
        grad = grad[:1].expand(case.shape)
    if case.manifold == Grassmann.name:  # a transported momentum is tangent and short
        tangent = GEOMETRIES[Grassmann.code].proj(matrices(weight, layout), matrices(momentum, layout), 1.0)
        momentum = (tangent / 64).reshape(case.shape).to(case.dtype).double()

    of = BY_NAME[case.manifold]
    group = plan.Group(
        0,
        0,
        case.rule,
        of.code,
        RETRACTIONS[case.retraction],
        layout,
        individual=case.individual,
        step_size="none" if case.individual else "general",
        scale=SCALE,
    )
    table = plan.Plan.build([group], [weight])
    hyper = _hyper(case, 0.5 * momentum + grad, shape.count)
    arithmetic = torch.promote_types(case.dtype, torch.float32)

    def state(dtype: torch.dtype, device: torch.device) -> _State:
        variance = torch.full((shape.count,), 0.005, dtype=torch.promote_types(dtype, torch.float32), device=device)
        if case.rule != "adam_g":
            variance = variance[:0]
        return _State(
            _stored(weight.to(device, dtype), case.layout),
            _stored(momentum.to(device, dtype), case.layout),
            variance,
            torch.ones(1, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )

    device = device_of(backend)
    wanted, got = state(torch.float64, torch.device("cpu")), state(case.dtype, device)
    if case.layout == "expanded gradient":
        narrow = grad[:1].to(device, case.dtype).expand(case.shape)
    else:
        narrow = _stored(grad.to(device, case.dtype), case.layout)
    _step(reference_step, table, hyper, wanted, grad)
    _step(ops.resolve(backend, device), table, hyper, got, narrow)

    eps, eps_c = torch.finfo(case.dtype).eps, torch.finfo(arithmetic).eps
    error = _error(got.weight.cpu(), wanted.weight, weight, layout, eps)
    moved = _error(got.momentum.cpu(), wanted.momentum, momentum, layout, eps)
    sums = 4 + 6 * math.sqrt(shape.n * shape.p)
    if case.dtype == torch.float64:
        sums *= 2
    limit = 0.5 + (1 if case.manifold == Euclidean.name else sums) * eps_c / eps
    if case.rule == "psi_sgd":
        limit += 0.5
    if case.rule == "fg_sgd" and moved != 0:  # exact, as said above
        error = math.inf
    if not torch.equal(got.steps.cpu(), wanted.steps) or not torch.equal(got.nonfinite.cpu(), wanted.nonfinite):
        error = math.inf
    return Outcome(max(error, moved), limit)


#: LAPACK's own tests pass ratios below 30; a QR without pivoting by orthogonal transformations stays below 5.
QR_LIMIT = 5.0

QR_KINDS = ("random", "diagonal", "ill-conditioned", "tiny", "huge", "zero column", "equal columns")
QR_SIZES = ((3, 3), (5, 5), (7, 7), (9, 4), (32, 32), (64, 32), (128, 7))


def qr_matrices(kind: str, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Sixteen matrices of one kind of LAPACK's test matrices, ``(16, m, n)``."""
    generator = torch.Generator().manual_seed(0)
    m, n = size
    a = torch.randn((16, m, n), dtype=torch.float64, generator=generator)
    info = torch.finfo(dtype)
    if kind == "diagonal":
        a = torch.eye(m, n, dtype=torch.float64) * a
    elif kind == "ill-conditioned":
        u, _, vt = torch.linalg.svd(a, full_matrices=False)
        a = u * torch.logspace(0, math.log10(info.eps), n, dtype=torch.float64) @ vt
    elif kind == "tiny":
        a = a * info.tiny * 16 / info.eps
    elif kind == "huge":
        a = a / a.abs().max() * info.max / (16 * m)
    elif kind == "zero column":
        a[..., n // 2] = 0
    elif kind == "equal columns":
        a[..., -1] = a[..., 0]
    return a.to(dtype)


def run_qr(kind: str, size: tuple[int, int], dtype: torch.dtype, backend: str) -> Outcome:
    """The larger of ``||I - Q^T Q||_1/(m eps)`` and ``||A - QR||_1/(||A||_1 m eps)``; infinite where diag(R) < 0."""
    a = qr_matrices(kind, size, dtype)
    q, r = (factor.cpu().double() for factor in functional.qr(a.to(device_of(backend)), backend=backend))
    a = a.double()
    unit = a.shape[-2] * torch.finfo(dtype).eps
    largest = a.abs().amax((-2, -1), keepdim=True)  # so that no norm of a huge or tiny matrix leaves the range
    scaled, scaled_r = a / largest, r / largest
    orthogonal = _one_norm(q.mT @ q - torch.eye(q.shape[-1], dtype=torch.float64)) / unit
    residual = _one_norm(scaled - q @ scaled_r) / (_one_norm(scaled) * unit)
    error = float(torch.maximum(orthogonal, residual).max())
    if math.isnan(error) or bool((r.diagonal(dim1=-2, dim2=-1) < 0).any()):
        error = math.inf
    return Outcome(error, QR_LIMIT)


def _one_norm(a: Tensor) -> Tensor:
    return a.abs().sum(-2).amax(-1)
