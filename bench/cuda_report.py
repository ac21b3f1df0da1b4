"""What one can expect of the CUDA kernels on GPUs that are not there: ``make cuda-report``.

Compiles them and writes ``docs/cuda_resources.md``, what every kernel takes, and ``docs/performance_gpu.md``, what that
makes of a step: bytes, instructions, occupancy, predicted times, and which targets hold. Nothing of it was measured on
a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from cuda_gpus import GPUS, LATENCY, Gpu, occupancy
from cuda_resources import ARCHITECTURES, ROOT, Resources, missing, nvcc_release, resources
from cuda_routes import Route, routes

#: Bytes an element that torch's fused SGD with momentum moves in float32: W, gradient, momentum; W, momentum.
EUCLIDEAN = 20

#: Kernels whose threads share a vector or a matrix, for the second table: name and what it steps.
SHARED_WORK = (
    ("elements float step", "Euclidean tensors"),
    ("vectors 8 float step", "spheres to 32 elements, columns of oblique matrices"),
    ("vectors 32 float step", "to 1024"),
    ("vectors 256 float step", "longer ones"),
    ("scale_invariant 32 float step", "PSI-SGD, filters to 1024 elements"),
    ("scale_invariant 256 float step", "longer ones"),
    ("grassmann 32 float step", "SGD-G and Adam-G, filters to 1024 elements"),
    ("grassmann 256 float step", "longer ones"),
    ("matrices 32 float step", "Stiefel matrices to 32 rows"),
    ("matrices 256 float step", "to 128 rows"),
)

RESOURCES = """# What the CUDA kernels take

Written by `make cuda-report` from what nvcc {nvcc} makes of every kernel; `tests/test_cuda_compile.py` holds each to
a ceiling. [Performance on a GPU](performance_gpu.md) says what follows from it, [The CUDA backend](cuda.md) which
kernel steps what.

Three figures in a cell are those of {architectures}, one figure is that of all. Spills are bytes stored
and loaded, stack is bytes a thread, shared memory bytes a block; kernels of matrices in shared memory take more of it,
by the size of the matrix. Loads and stores are instructions of 16 bytes: W, gradient and momentum for each storage type
(float32, bfloat16 and float16 in a `float` kernel), more where the compiler unrolls. Occupancy is the share of 64 warps
that a multiprocessor can hold.

{table}
"""

PERFORMANCE = """# Performance on a GPU, predicted

**Nothing was timed on a GPU yet.** Every figure here is written by `make cuda-report`, from the binaries of nvcc
{nvcc}, the launches and NVIDIA's data sheets ({gpus}).
`make bench-gpu` measures where there is a GPU.

## Bytes

| a step with momentum, float32 | reads | writes | bytes an element | {memory_heads} |
| --- | --- | --- | --- | {memory_rules} |
{bytes}

One pass: step sizes that depend on no norm, or on that of a component, and groups that fit in a block. Two: a norm over
more than a block. float64 takes twice of it, bfloat16 and float16 half. A vector to several threads is swept more than
once; later sweeps find it in the cache.

## Small matrices, one to a thread

Contiguous float32 weights with momentum, one norm a matrix, QR or projection. Instructions of a thread, for each
element, are counted in a binary of that way alone, conditions taken, loops as often as they run; registers and
occupancy are those of the kernel that has all ways. "Execution" is the time of the busiest unit: the issue of all
instructions, floating-point numbers, integers, special functions, or memory, shared and global. "Waiting" is that of
all resident threads, each for one load after the other, at {latency} ns (a guess). A block loads, then computes: the
time of a step is that of the memory, if waiting and execution together take less.

{small}

## Vectors and matrices, shared by threads

Their instructions depend on sizes that are known at run time and are not predicted.

{shared}

## Targets

| target | | figure |
| --- | --- | --- |
{targets}
"""


def row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(headings: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    return "\n".join([row(headings), row("---" for _ in headings), *map(row, rows)])


def each(figures: Iterable[object]) -> str:
    """One figure where all are the same."""
    texts = [str(figure) for figure in figures]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def kernels_table(found: dict[str, dict[str, Resources]]) -> str:
    """A row for each kernel, over all architectures."""

    def cells(name: str) -> list[str]:
        of = [found[architecture][name] for architecture in ARCHITECTURES]
        wide = [f"{one.loads[128]} + {one.stores[128]}" for one in of]
        columns = [[one.registers for one in of], [one.spills for one in of], [one.stack for one in of]]
        columns += [[one.shared for one in of], wide, [f"{occupancy(one):.0%}" for one in of]]
        return [name, *map(each, columns)]

    headings = ["kernel", "registers", "spills", "stack", "shared", "16-byte loads + stores", "occupancy"]
    return table(headings, map(cells, sorted(found["sm_90"])))


def small_table(ways: dict[str, dict[str, Route]], found: dict[str, dict[str, Resources]]) -> str:
    """A row for each size class, with the figures of all GPUs."""
    headings = ["kernel", "bytes", "by 16", "instructions", "of arithmetic"]
    for gpu in GPUS:
        headings += [f"{gpu.name}: registers", "occupancy", "memory, ps", "waiting", "execution"]
    rows = []
    for name in sorted(ways[GPUS[0].architecture]):
        of = [ways[gpu.architecture][name] for gpu in GPUS]
        cells = [name.removeprefix("small ").removesuffix(" float step"), each(f"{one.wide:.0f}" for one in of)]
        cells += [each(f"{one.share():.0%}" for one in of), each(f"{one.work['issue']:.0f}" for one in of)]
        cells.append(each(f"{one.work['float'] + one.work['special']:.0f}" for one in of))
        for gpu, one in zip(GPUS, of, strict=True):
            kernel = found[gpu.architecture][name]
            time, unit = gpu.execution(one)
            cells += [str(kernel.registers), f"{occupancy(kernel):.0%}", f"{gpu.memory(one.wide + one.other):.1f}"]
            cells += [f"{gpu.waiting(kernel):.1f}", f"{time:.1f} ({unit})"]
        rows.append(cells)
    return table(headings, rows)


def shared_table(found: dict[str, dict[str, Resources]]) -> str:
    """The kernels whose threads share a vector or a matrix."""
    headings = ["kernel", "steps", "bytes"]
    for gpu in GPUS:
        headings += [f"{gpu.name}: registers", "occupancy", "memory, ps"]
    rows = []
    for name, what in SHARED_WORK:
        cells = [name.removesuffix(" float step"), what, str(EUCLIDEAN)]
        for gpu in GPUS:
            kernel = found[gpu.architecture][name]
            share = f"{occupancy(kernel):.0%}" if not name.startswith("matrices") else "by size"
            cells += [str(kernel.registers), share, f"{gpu.memory(EUCLIDEAN):.1f}"]
        rows.append(cells)
    return table(headings, rows)


def bytes_rows() -> str:
    reads, buffers = "W, gradient, momentum", "W, momentum"
    lines = [("torch's fused SGD", reads, buffers, EUCLIDEAN), ("one pass", reads, buffers, EUCLIDEAN)]
    lines += [("two passes, matrices and vectors: norms; steps", f"{reads}; {buffers}", "momentum; W", 28)]
    lines += [("two passes, tensors in one piece: norms; steps", f"{reads}; the same", f"nothing; {buffers}", 32)]
    return "\n".join(row([*line, *(f"{gpu.memory(line[-1]):.1f}" for gpu in GPUS)]) for line in lines)


def targets(ways: dict[str, dict[str, Route]], found: dict[str, dict[str, Resources]]) -> str:
    """What was promised, and the figure that decides."""
    all_ways = [way for by_name in ways.values() for way in by_name.values()]
    moved = max(way.wide for way in all_ways)
    lines = [("bytes of tensors in one pass as in the Euclidean step", moved == EUCLIDEAN, f"{moved:g} of {EUCLIDEAN}")]
    for gpu in GPUS:
        of = ways[gpu.architecture].values()
        share, name = max((gpu.execution(way)[0] / gpu.memory(way.wide + way.other), way.name) for way in of)
        what = f"execution below the memory's time to 8 x 8, {gpu.name}"
        lines.append((what, share < 1, f"at most {share:.0%} of it ({name})"))
    least = min(all_ways, key=Route.share)
    what = "80 % of global bytes by 16 at a time, contiguous tensors"
    lines.append((what, least.share() >= 0.8, f"at least {least.share():.0%} ({least.name})"))
    every = [kernel for by_name in found.values() for kernel in by_name.values()]
    small = {kernel.name for kernel in every if kernel.name.startswith("small")}
    spilled = {kernel.name for kernel in every if kernel.spills} & small
    lines.append(("no spills to 8 x 8", not spilled, f"{len(spilled)} of {len(small)} kernels spill"))
    three = [kernel.registers for kernel in every if kernel.name == "small stiefel qr 3x3 float step"]
    lines.append(("at most 64 registers for the step of 3 x 3 Stiefel", max(three) <= 64, f"{max(three)}"))
    launches = "at most 2 launches for each size class, dtype and retraction, whatever the number of tensors"
    lines.append(
        (launches, True, "2, and one that counts the step (`test_launches_do_not_grow_with_the_number_of_tensors`)")
    )
    return "\n".join(row([what, "held" if holds else "missed", figure]) for what, holds, figure in lines)


def describe(gpu: Gpu) -> str:
    return (
        f"{gpu.name}: {gpu.bandwidth / 1e12:g} TB/s, {gpu.multiprocessors} multiprocessors at {gpu.clock / 1e9:g} GHz"
    )


def main() -> None:
    if (reason := missing()) is not None:
        sys.exit(f"cuda-report: {reason}")
    found = {one: {kernel.name: kernel for kernel in resources(one)} for one in ARCHITECTURES}
    ways = {gpu.architecture: routes(gpu.architecture) for gpu in GPUS}
    nvcc = nvcc_release()
    pages = {
        "cuda_resources.md": RESOURCES.format(
            nvcc=nvcc, architectures=" / ".join(ARCHITECTURES), table=kernels_table(found)
        ),
        "performance_gpu.md": PERFORMANCE.format(
            nvcc=nvcc,
            gpus="; ".join(map(describe, GPUS)),
            memory_heads=" | ".join(f"{gpu.name}, ps" for gpu in GPUS),
            memory_rules=" | ".join("---" for _ in GPUS),
            bytes=bytes_rows(),
            latency=LATENCY,
            small=small_table(ways, found),
            shared=shared_table(found),
            targets=targets(ways, found),
        ),
    }
    for name, text in pages.items():
        (ROOT / "docs" / name).write_text(text)
        print(f"written: docs/{name}")


if __name__ == "__main__":
    main()
