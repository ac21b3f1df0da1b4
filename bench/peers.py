"""The time of a step on kernels of one convolution by other means: geoopt, and the formulas in eager PyTorch.

Run as ``python bench/peers.py``. Every peer takes turns with ``FGSGD`` on the same weight; it measures and asserts
nothing. geoopt wants a batch of matrices, so that it gets a copy of the kernels in that shape.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import geoopt
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from manifold_kernels import FGSGD, functional
from manifold_kernels.views import Layout

LR, MOMENTUM = 1e-3, 0.9


def fused(of: str, kernels: Tensor) -> Callable[[], object]:
    weight = kernels.clone().requires_grad_()
    weight.grad = torch.randn_like(weight)
    functional.project_weight_(of, weight, Layout("kernel"))
    # Without a bound on the step size, which geoopt has not either.
    return FGSGD([weight], lr=LR, momentum=MOMENTUM, manifold=of, view="kernel", step_size="none").step


def geoopt_step(of: str, kernels: Tensor) -> Callable[[], object]:
    manifold = {"sphere": geoopt.Sphere(), "stiefel": geoopt.EuclideanStiefel()}[of]
    batch = kernels.flatten(0, 1)
    points = functional.projx(of, batch)
    points = points.flatten(1) if of == "sphere" else points
    weight = geoopt.ManifoldParameter(points, manifold=manifold)
    weight.grad = torch.randn_like(weight)
    return geoopt.optim.RiemannianSGD([weight], lr=LR, momentum=MOMENTUM).step


def eager(of: str, kernels: Tensor) -> Callable[[], object]:
    """The same step written with the functional API, which is plain PyTorch."""
    weight = functional.projx(of, kernels.flatten(0, 1))
    grad, momentum = torch.randn_like(weight), torch.zeros_like(weight)

    def step() -> None:
        momentum.mul_(MOMENTUM).add_(grad)
        xi = functional.proj(of, weight, momentum)
        weight.copy_(functional.retr(of, weight, -LR * xi))

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    kernels = torch.randn(options.channels, options.channels, 3, 3)
    table = Table(title=f"{options.channels}² kernels 3x3, {torch.get_num_threads()} threads, medians")
    for heading in ("manifold", "peer", "peer ms", "FGSGD ms", "ratio"):
        table.add_column(heading)
    for of in ("sphere", "stiefel"):
        for name, build in (("geoopt RiemannianSGD", geoopt_step), ("eager PyTorch", eager)):
            peer, ours = build(of, kernels), fused(of, kernels)
            times = [[_time(peer), _time(ours)] for _ in range(options.repeats + 2)][2:]
            theirs, own = (statistics.median(column) for column in zip(*times, strict=True))
            table.add_row(of, name, f"{theirs * 1e3:.2f}", f"{own * 1e3:.2f}", f"{theirs / own:.1f}")
    Console().print(table)


def _time(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
