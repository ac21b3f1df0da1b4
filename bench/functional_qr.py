"""The time of ``functional.qr``, ``qf`` and ``polar`` beside ``torch.linalg.qr`` and ``svd`` on the same batches.

Run as ``python bench/functional_qr.py``. All take turns on the same matrices; it measures and asserts nothing. The
first size, 270,000 matrices 3 x 3, is the case of pytorch issue 143281.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from options import at_least, threads
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from manifold_kernels import functional

#: n, p and how many matrices: a few milliseconds of kernels each.
SIZES = (
    (3, 3, 270_000),
    (2, 2, 100_000),
    (4, 4, 50_000),
    (5, 5, 20_000),
    (7, 7, 10_000),
    (8, 8, 10_000),
    (9, 3, 20_000),
    (3, 9, 20_000),
    (16, 16, 2_000),
    (32, 16, 1_000),
    (16, 32, 1_000),
    (24, 24, 500),
    (32, 32, 500),
    (64, 32, 250),
    (32, 64, 250),
)
#: The SVD that polar stands beside is so slow that it gets a part of the batch.
POLAR_MATRICES = 2_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=at_least(1), default=7)
    parser.add_argument("--threads", type=at_least(1), nargs="+", default=[1, torch.get_num_threads()])
    options = parser.parse_args()
    torch.manual_seed(0)
    console = Console(width=180)
    for count in sorted(set(options.threads)):
        title = (
            f"nanoseconds a matrix and how many times faster, {count} threads: medians of {options.repeats} (minima)"
        )
        table = Table(title=title, box=SIMPLE_HEAD)
        for heading in ("", "n x p", "matrices", "linalg.qr", "qr", "", "qf", "", "linalg.svd", "polar", ""):
            table.add_column(heading, justify="right", no_wrap=True)
        with threads(count):
            for dtype in (torch.float32, torch.float64):
                for n, p, matrices in SIZES:
                    cells = row(torch.randn(matrices, n, p, dtype=dtype), options.repeats)
                    table.add_row(str(dtype).removeprefix("torch."), f"{n} x {p}", str(matrices), *cells)
        console.print(table)


def row(x: torch.Tensor, repeats: int) -> list[str]:
    """The cells of the table for one batch."""
    few = x[:POLAR_MATRICES]
    decompositions = [lambda: torch.linalg.qr(x), lambda: functional.qr(x), lambda: functional.qf(x)]
    polars = [lambda: torch.linalg.svd(few, full_matrices=False), lambda: functional.polar(few)]
    return compared(decompositions, len(x), repeats) + compared(polars, len(few), max(1, repeats // 3))


def compared(functions: list[Callable[[], object]], matrices: int, repeats: int) -> list[str]:
    """Times of the first function, then times and ratios of the others; interleaved, one call each that is not counted.

    Beside medians stand minima, which say more on a machine that others use as well.
    """
    rounds = [[_time(function) for function in functions] for _ in range(repeats + 1)][1:]
    columns = [[1e9 / matrices * seconds for seconds in column] for column in zip(*rounds, strict=True)]
    median, least = [statistics.median(column) for column in columns], [min(column) for column in columns]
    cells = [f"{median[0]:.0f} ({least[0]:.0f})"]
    for i in range(1, len(functions)):
        cells += [f"{median[i]:.0f} ({least[i]:.0f})", f"{median[0] / median[i]:.1f} ({least[0] / least[i]:.1f})"]
    return cells


def _time(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
