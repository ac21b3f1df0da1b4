"""The same step by other means: geoopt, plain PyTorch, eager and compiled, and what is done instead of one.

Peers have the kernels as batches of matrices ``(count, n, p)`` or rows, which is what they want, at unit scale; weights
that lie on no manifold take fused SGD. Both Stiefel steps of PyTorch retract by QR.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from manifold_kernels.bench.methods import LR, MOMENTUM, Step, constrained
from manifold_kernels.bench.workloads import Workload
from manifold_kernels.manifolds import BY_NAME
from manifold_kernels.views import Layout, matrices


@dataclass(frozen=True)
class Peer:
    """Another way to take a step.

    Attributes:
        name: what tables and filters call it.
        manifold: the manifold that it steps on, for workloads that have it.
        make: from a workload and that manifold to a step.
        missing: why it cannot be used here, or ``None``.
    """

    name: str
    manifold: str
    make: Callable[[Workload, str], Step]
    missing: Callable[[], str | None]

    def step(self, workload: Workload) -> Step:
        """The step on new weights."""
        return self.make(workload, self.manifold)


@dataclass(frozen=True)
class _Batches:
    """The constrained weights as batches of components, and the others' step."""

    weights: list[Tensor]
    grads: list[Tensor]
    others: list[Tensor]

    @classmethod
    def of(cls, workload: Workload, manifold: str) -> _Batches:
        groups = constrained(workload, workload.model(), BY_NAME[manifold]())
        others = [weight for group in groups if group["manifold"] is None for weight in group["params"]]
        weights, grads = [], []
        for group in groups:
            for weight in group["params"] if group["manifold"] is not None else ():
                layout = Layout(group["view"])
                weights.append(matrices(weight.detach(), layout).clone())
                grads.append(matrices(weight.grad, layout).clone())
        if manifold == "sphere":
            weights, grads = ([batch.flatten(1) for batch in part] for part in (weights, grads))
        return cls(weights, grads, others)

    def step_with(self, step: Callable[[list[Tensor], list[Tensor], list[Tensor]], object]) -> Step:
        """``step`` of weights, gradients and momenta, and fused SGD of the others."""
        momenta = [torch.zeros_like(grad) for grad in self.grads]
        if not self.others:
            return lambda: step(self.weights, self.grads, momenta)
        rest = torch.optim.SGD(self.others, LR, momentum=MOMENTUM, fused=True)

        def both() -> None:
            step(self.weights, self.grads, momenta)
            rest.step()

        return both


def _geoopt(workload: Workload, manifold: str) -> Step:
    import geoopt

    batches = _Batches.of(workload, manifold)
    of = {"sphere": geoopt.Sphere, "stiefel": geoopt.EuclideanStiefel}[manifold]()
    points = [geoopt.ManifoldParameter(weight, manifold=of) for weight in batches.weights]
    for point, grad in zip(points, batches.grads, strict=True):
        point.grad = grad
    step: Step = geoopt.optim.RiemannianSGD([*points, *batches.others], lr=LR, momentum=MOMENTUM).step
    return step


def _eager(workload: Workload, manifold: str) -> Step:
    one = {"sphere": _sphere, "stiefel": _stiefel_by_library}[manifold]
    return _Batches.of(workload, manifold).step_with(partial(_each, one))


def _compiled(workload: Workload, manifold: str) -> Step:
    torch._dynamo.reset()  # the generated code has its number of threads in it
    one = {"sphere": _sphere, "stiefel": _stiefel_by_formula}[manifold]
    compiled = torch.compile(partial(_each, one), dynamic=False, fullgraph=True)
    return _Batches.of(workload, manifold).step_with(compiled)


def _normalised(workload: Workload, manifold: str) -> Step:
    """Not Riemannian: the Euclidean step, then back to unit norm."""
    batches = _Batches.of(workload, manifold)
    for weight, grad in zip(batches.weights, batches.grads, strict=True):
        weight.grad = grad
    sgd = torch.optim.SGD([*batches.weights, *batches.others], LR, momentum=MOMENTUM, fused=True)

    def step() -> None:
        sgd.step()
        for weight in batches.weights:
            weight.div_(torch.linalg.vector_norm(weight, dim=1, keepdim=True))

    return step


def _each(
    one: Callable[[Tensor, Tensor], Tensor], weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor]
) -> None:
    for w, g, m in zip(weights, grads, momenta, strict=True):
        m.mul_(MOMENTUM).add_(g)
        w.copy_(one(w, m))


def _sphere(w: Tensor, m: Tensor) -> Tensor:
    y = w - LR * (m - w * (w * m).sum(1, keepdim=True))
    return functional.normalize(y, dim=1)


def _stiefel_by_library(w: Tensor, m: Tensor) -> Tensor:
    s = w.mT @ m
    q, r = torch.linalg.qr(w - LR * (m - w @ (s + s.mT) / 2))
    return torch.mul(q, r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2))


def _stiefel_by_formula(w: Tensor, m: Tensor) -> Tensor:
    """What a compiler can fuse: Gram-Schmidt on single elements up to 4x4, above it an iteration of matrix products."""
    if max(w.shape[1:]) <= 4:
        return _gram_schmidt(w, m)
    s = w.mT @ m
    y = w - LR * (m - w @ (s + s.mT) / 2)
    # X <- X (I - up(X^T X - I)) has the limit qf(Y), quadratically; a short step needs two.
    for _ in range(2):
        excess = y.mT @ y - torch.eye(y.shape[2])
        y = y - y @ (excess.triu(1) + torch.diag_embed(excess.diagonal(dim1=-2, dim2=-1) / 2))
    return y


def _gram_schmidt(w: Tensor, m: Tensor) -> Tensor:
    n, p = w.shape[1:]
    ws = [[w[:, i, j] for i in range(n)] for j in range(p)]  # columns
    ms = [[m[:, i, j] for i in range(n)] for j in range(p)]
    s = [[_dot(a, b) for b in ms] for a in ws]
    columns: list[list[Tensor]] = []
    for j in range(p):
        v = []
        for i in range(n):
            turned = sum((ws[k][i] * (s[k][j] + s[j][k]) for k in range(p)), torch.zeros(()))
            v.append(ws[j][i] - LR * (ms[j][i] - turned / 2))
        for q in columns:
            along = _dot(q, v)
            v = [x - along * y for x, y in zip(v, q, strict=True)]
        length = _dot(v, v).rsqrt()
        columns.append([x * length for x in v])
    return torch.stack([columns[j][i] for i in range(n) for j in range(p)], 1).reshape(w.shape)


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    total = a[0] * b[0]
    for x, y in zip(a[1:], b[1:], strict=True):
        total = total + x * y
    return total


def _nothing_missing() -> None:
    return None


@cache
def _geoopt_missing() -> str | None:
    try:
        import geoopt  # noqa: F401
    except ImportError as error:
        return f"{error}. Install it: `pip install geoopt`"
    return None


@cache
def _compiler_missing() -> str | None:
    """Whether torch.compile works can only be tried; it raises whatever its parts raise."""
    try:
        torch.compile(torch.neg)(torch.ones(8))
    except Exception as error:
        return f"torch.compile fails: {str(error).strip().splitlines()[0]}"
    return None


PEERS: tuple[Peer, ...] = (
    Peer("geoopt sphere", "sphere", _geoopt, _geoopt_missing),
    Peer("geoopt stiefel", "stiefel", _geoopt, _geoopt_missing),
    Peer("eager sphere", "sphere", _eager, _nothing_missing),
    Peer("eager stiefel", "stiefel", _eager, _nothing_missing),
    Peer("compiled sphere", "sphere", _compiled, _compiler_missing),
    Peer("compiled stiefel", "stiefel", _compiled, _compiler_missing),
    Peer("SGD, then normalise", "sphere", _normalised, _nothing_missing),
)
