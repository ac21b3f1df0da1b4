"""Time of a step on a GPU against ``torch.optim.SGD(momentum=0.9, fused=True)`` on the same shapes: ``make bench-gpu``.

The two take turns; figures are medians of CUDA events around ten steps each. It measures and asserts nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from manifold_kernels import functional, ops
from manifold_kernels.manifolds import Euclidean, Manifold, Oblique, ScaleInvariant, Sphere, Stiefel
from manifold_kernels.optim import FGSGD, PSISGD
from manifold_kernels.views import Layout

STEPS, REPEATS = 10, 41
WIDTHS = (64, 128, 256, 512)
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "conv 512x512x3x3": [(512, 512, 3, 3)],
    "conv 1024x1024x3x3": [(1024, 1024, 3, 3)],
    "ResNet-18, 3x3 convolutions": [
        (b, a, 3, 3) for width in WIDTHS for a, b in ((max(width // 2, 64), width), *[(width, width)] * 3)
    ],
}
METHODS: dict[str, Manifold] = {
    "FG-SGD euclidean": Euclidean(),
    "FG-SGD sphere": Sphere("fan"),
    "FG-SGD oblique": Oblique("fan"),
    "FG-SGD stiefel": Stiefel("fan"),
    "PSI-SGDM": ScaleInvariant(),
}


def weights(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """He-normal weights with small gradients."""
    made = []
    for shape in shapes:
        weight = (torch.randn(shape, device="cuda") * math.sqrt(2 / math.prod(shape[1:]))).requires_grad_()
        weight.grad = torch.randn(shape, device="cuda") * 1e-3
        made.append(weight)
    return made


def optimizer(manifold: Manifold, params: list[Tensor]) -> torch.optim.Optimizer:
    """The optimizer of ``params``, put on the manifold."""
    if isinstance(manifold, Euclidean):
        return FGSGD(params, lr=1e-3, momentum=0.9)
    if isinstance(manifold, ScaleInvariant):
        return PSISGD([{"params": params, "manifold": manifold}], lr=1e-3, momentum=0.9)
    for param in params:
        functional.project_weight_(manifold, param, Layout("kernel"))
    return FGSGD([{"params": params, "manifold": manifold, "view": "kernel"}], lr=1e-3, momentum=0.9)


def milliseconds(step: Callable[[], object]) -> float:
    """The time of a step on the device, launches included, in a row of them."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(STEPS):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / STEPS


def main() -> None:
    torch.manual_seed(0)
    console = Console()
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, backend {ops.automatic('cuda')}")
    table = Table("weights", "method", title="A step against fused SGD with momentum: medians")
    for heading in ("SGD ms", "step ms", "ratio", "GB/s"):
        table.add_column(heading, justify="right")
    for name, shapes in SHAPES.items():
        for method, manifold in METHODS.items():
            sgd = torch.optim.SGD(weights(shapes), lr=1e-3, momentum=0.9, fused=True)
            ours = optimizer(manifold, weights(shapes))
            for one in (sgd, ours, sgd, ours):
                milliseconds(one.step)
            pairs = [(milliseconds(sgd.step), milliseconds(ours.step)) for _ in range(REPEATS)]
            theirs, mine = (statistics.median(times) for times in zip(*pairs, strict=True))
            moved = 20 * sum(map(math.prod, shapes))  # W, gradient and momentum read, W and momentum written
            table.add_row(
                name, method, f"{theirs:.3f}", f"{mine:.3f}", f"{mine / theirs:.2f}", f"{moved / mine / 1e6:.0f}"
            )
        table.add_section()
    console.print(table)


if __name__ == "__main__":
    main()
