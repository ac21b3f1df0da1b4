"""Time of an optimizer step against ``torch.optim.SGD(momentum=0.9, fused=True)`` on the same tensors.

The two optimizers take turns in one run, so that both see the same machine; figures are medians with the
quartiles of the ratio. It measures and asserts nothing.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from manifold_kernels import functional, info
from manifold_kernels.manifolds import Euclidean, Manifold, Oblique, ScaleInvariant, Sphere, Stiefel
from manifold_kernels.optim import FGSGD, PSISGD
from manifold_kernels.views import Layout

#: Widths of the four stages of ResNet-18 for ImageNet.
_WIDTHS = (64, 128, 256, 512)


@dataclass(frozen=True)
class Workload:
    """Weights that are stepped together, and the view in which they lie on a manifold."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    view: str = "kernel"


WORKLOADS: tuple[Workload, ...] = (
    Workload("conv 256x256x3x3", ((256, 256, 3, 3),)),
    Workload("conv 1024x1024x3x3", ((1024, 1024, 3, 3),)),
    Workload(
        "ResNet-18, 3x3 convolutions",
        tuple((b, a, 3, 3) for width in _WIDTHS for a, b in ((max(width // 2, 64), width), *[(width, width)] * 3)),
    ),
    Workload("512 matrices 64x32", ((512, 1, 64, 32),)),
    Workload("512 rows of 4608", ((512, 4608),), view="filter"),
)
QUICK = WORKLOADS[:1]


@dataclass(frozen=True)
class Method:
    """An optimizer to be timed.

    Attributes:
        manifold: where the weights lie.
        momentum: without it the float32 step must move 12 bytes an element, with it 20.
    """

    name: str
    manifold: Manifold
    momentum: float = 0.9

    @property
    def bytes(self) -> int:
        return 20 if self.momentum else 12

    def suits(self, workload: Workload) -> bool:
        """Whether it is worth a line: of vectors, oblique is frozen and Stiefel the sphere."""
        return workload.view == "kernel" or not isinstance(self.manifold, (Oblique, Stiefel))

    def optimizer(self, workload: Workload) -> torch.optim.Optimizer:
        """The optimizer of new weights of ``workload`` on the manifold."""
        params = _parameters(workload)
        if isinstance(self.manifold, Euclidean):
            return FGSGD(params, lr=1e-3, momentum=self.momentum)
        if isinstance(self.manifold, ScaleInvariant):
            return PSISGD([{"params": params, "manifold": self.manifold}], lr=1e-3, momentum=self.momentum)
        layout = Layout(workload.view)
        for param in params:
            functional.project_weight_(self.manifold, param, layout)
        group = {"params": params, "manifold": self.manifold, "view": workload.view}
        return FGSGD([group], lr=1e-3, momentum=self.momentum)


METHODS: tuple[Method, ...] = (
    Method("FG-SGD euclidean", Euclidean()),
    Method("FG-SGD sphere", Sphere("fan")),
    Method("FG-SGD oblique", Oblique("fan")),
    Method("FG-SGD stiefel", Stiefel("fan")),
    Method("PSI-SGD", ScaleInvariant(), momentum=0.0),
    Method("PSI-SGDM", ScaleInvariant()),
)


@dataclass(frozen=True)
class Result:
    """One line of the table. Times are medians in milliseconds; the quartiles are those of the ratio."""

    workload: str
    method: str
    threads: int
    elements: int
    sgd_ms: float
    step_ms: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    gigabytes_per_second: float


def _parameters(workload: Workload) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in workload.shapes:
        fan_in = math.prod(shape[1:])
        weight = (torch.randn(shape, generator=generator) * math.sqrt(2 / fan_in)).requires_grad_()
        weight.grad = torch.randn(shape, generator=generator) * 1e-3
        parameters.append(weight)
    return parameters


def _time(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(workload: Workload, method: Method, threads: int, repeats: int) -> Result:
    """The step of ``method`` and of fused SGD on ``workload``, taking turns ``repeats`` times."""
    torch.set_num_threads(threads)
    ours = method.optimizer(workload)
    yardstick = torch.optim.SGD(_parameters(workload), lr=1e-3, momentum=0.9, fused=True)
    for _ in range(3):
        ours.step()
        yardstick.step()
    times = [(_time(yardstick.step), _time(ours.step)) for _ in range(repeats)]
    sgd = statistics.median(first for first, _ in times)
    step = statistics.median(second for _, second in times)
    low, _, high = statistics.quantiles([second / first for first, second in times], n=4)
    elements = sum(torch.Size(shape).numel() for shape in workload.shapes)
    return Result(
        workload.name,
        method.name,
        threads,
        elements,
        sgd * 1e3,
        step * 1e3,
        step / sgd,
        (low, high),
        method.bytes * elements / step / 1e9,
    )


def copy_bandwidth(threads: int) -> float:
    """Bytes read and written a second by a copy of 256 MB, in GB/s: what the machine's memory gives."""
    torch.set_num_threads(threads)
    source, target = torch.zeros(2**26), torch.zeros(2**26)
    times = [_time(lambda: target.copy_(source)) for _ in range(7)]
    return 2 * source.nbytes / statistics.median(times) / 1e9


def cases(quick: bool) -> Iterator[tuple[Workload, Method, int]]:
    """Everything to be measured: each workload and method on one thread and on all of them."""
    for workload in QUICK if quick else WORKLOADS:
        for method in METHODS:
            for threads in sorted({1, info.processors()}):
                if method.suits(workload):
                    yield workload, method, threads


def write(path: Path, results: Sequence[Result], bandwidth: dict[int, float]) -> None:
    """Write the results with machine, versions and, in a checkout, the commit as JSON."""
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": info.machine(),
        "build": info.build(),
        "commit": commit.stdout.strip() if commit.returncode == 0 else None,
        "copy_gigabytes_per_second": bandwidth,
        "results": [asdict(result) for result in results],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
