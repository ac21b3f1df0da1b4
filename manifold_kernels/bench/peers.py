"""The same step by other means: geoopt, plain PyTorch, eager and compiled, and what is done instead of one.

Peers have the kernels as batches of matrices ``(count, n, p)`` or rows, which is what they want, at unit scale; weights
that lie on no manifold take fused SGD.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from manifold_kernels.bench import formulas
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
    retract = partial(formulas.each, formulas.BY_LIBRARY[manifold])

    def step(weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor]) -> None:
        formulas.accumulate(grads, momenta)
        retract(weights, momenta)

    return _Batches.of(workload, manifold).step_with(step)


def _compiled(workload: Workload, manifold: str) -> Step:
    """Two graphs: in one, torch 2.13 cannot compile the sphere (a KeyError in the fusion of outer loops)."""
    torch._dynamo.reset()  # the generated code has its number of threads in it
    accumulate = torch.compile(formulas.accumulate, dynamic=False, fullgraph=True)
    retract = torch.compile(partial(formulas.each, formulas.FUSIBLE[manifold]), dynamic=False, fullgraph=True)

    def step(weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor]) -> None:
        accumulate(grads, momenta)
        retract(weights, momenta)

    batches = _Batches.of(workload, manifold)
    copies = ([batch.clone() for batch in part] for part in (batches.weights, batches.grads, batches.grads))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the compiler's, about itself
        step(*copies)
    return batches.step_with(step)


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
