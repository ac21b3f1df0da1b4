"""Taking the time: two steps in turns, so that both see the same machine. On a GPU by its own clock (CUDA events)."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from manifold_kernels.bench.cases import PEER, Case

#: Turns of a case: enough for quartiles of a slow one, and an end for a fast one.
_FEWEST, _MOST = 5, 4000
_WARM_UP = 3

#: Steps of a turn on a GPU: in a row, as they follow each other in a training whose queue never runs empty.
_ROW = 10


@dataclass(frozen=True)
class Result:
    """A measured case.

    Attributes:
        elements: weights that are stepped.
        baseline: what the ratio is to.
        turns: how often both were timed.
        baseline_ms: median in milliseconds.
        step_ms: median in milliseconds.
        ratio: the median over the turns of step time / baseline time.
        ratio_quartiles: of the same.
        bytes_per_element: what a step must move at least.
        gigabytes_per_second: those bytes over ``step_ms``.
    """

    workload: str
    method: str
    backend: str
    device: str
    threads: int
    elements: int
    baseline: str
    turns: int
    baseline_ms: float
    step_ms: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    bytes_per_element: int
    gigabytes_per_second: float

    @property
    def column(self) -> str:
        """The method, and the backend where it is not that of the compiled kernels."""
        return self.method if self.backend in (self.device, PEER) else f"{self.method}, {self.backend}"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch with ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def measure(case: Case, seconds: float, turns: int | None = None) -> Result:
    """Time the two steps of ``case``, in ``turns`` turns or as many as fit into ``seconds``, on the present threads.

    Every other turn begins with the other step, and the first few are not counted. Tensors are made before.
    """
    subject, baseline = case.subject(), case.baseline()
    clock = clock_of(case.workload.device)
    with _no_garbage_collection():
        for _ in range(_WARM_UP):
            subject()
            baseline()
        pairs: list[tuple[float, float]] = []
        end = time.perf_counter() + seconds
        while len(pairs) < (turns or _FEWEST) or (turns is None and len(pairs) < _MOST and time.perf_counter() < end):
            if len(pairs) % 2:
                first = clock(subject)
                pairs.append((first, clock(baseline)))
            else:
                first = clock(baseline)
                pairs.append((clock(subject), first))
    step, other = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = [own / yardstick for own, yardstick in pairs]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    elements = case.workload.elements()
    moved = case.accesses * case.workload.dtype.itemsize
    return Result(
        workload=case.workload.name,
        method=case.method,
        backend=case.backend,
        device=case.workload.device,
        threads=case.threads,
        elements=elements,
        baseline=case.baseline_name,
        turns=len(pairs),
        baseline_ms=other * 1e3,
        step_ms=step * 1e3,
        ratio=median,
        ratio_quartiles=(low, high),
        bytes_per_element=moved,
        gigabytes_per_second=moved * elements / step / 1e9,
    )


@dataclass(frozen=True)
class Bandwidth:
    """Bytes read and written a second, in GB/s.

    Attributes:
        copy: by a copy of 256 MB. Where stores do not bypass the caches, the target is read, too, which is not counted.
        update: by a change of 256 MB in place, as weights and momenta change: what memory gives a step.
    """

    copy: float
    update: float


def bandwidth(device: str = "cpu") -> Bandwidth:
    """The memory's rates on the present threads, or on the GPU, the best of nine."""
    source, target = torch.ones(2**26, device=device), torch.zeros(2**26, device=device)
    clock = clock_of(device)

    def rate(pass_over: Callable[[], object]) -> float:
        return 2 * source.nbytes / min(clock(pass_over) for _ in range(9)) / 1e9

    return Bandwidth(copy=rate(lambda: target.copy_(source)), update=rate(target.neg_))


def clock_of(device: str) -> Callable[[Callable[[], object]], float]:
    """What takes the seconds of a step there."""
    return {"cpu": _on_the_cpu, "cuda": _on_the_gpu}[device]


def _on_the_cpu(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _on_the_gpu(step: Callable[[], object]) -> float:
    """Of one in a row of steps, launches included where the GPU waits for them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for _ in range(_ROW):
        step()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3 / _ROW
