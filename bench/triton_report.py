"""What compilers make of the Triton kernels, for GPUs that are not there: ``make triton-report``.

Reads the lines of ``tests/triton_compiled.py`` and writes ``docs/triton_resources.md``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import triton

PAGE = Path(__file__).resolve().parents[1] / "docs" / "triton_resources.md"

TEXT = """# What the Triton kernels take

Written by `make triton-report` from what Triton {version} makes of the kernels for GPUs that are not there;
`tests/test_triton_compile.py` holds them to ceilings. [The Triton backend](triton.md) says which kernel steps what.
Weights are float32 where no type is said, with momentum; "scaled" ones with a gradient scaler; where a kernel has a
part for norms and one for steps, with the step size of [FG] Eq. 5.

Figures in a cell are those of {targets}, one figure is that of all. Spills are bytes a thread,
stored and loaded (registers on gfx942). "By 16 bytes": the share of 16-byte accesses to memory among all but those of
8, which are to the tables.

| kernel | registers | spills | by 16 bytes |
| --- | --- | --- | --- |
{rows}
"""


def each(figures: Iterable[object]) -> str:
    """One figure where all are the same."""
    texts = [str(figure) for figure in figures]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def main(lines: Iterable[str]) -> None:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for line in lines:
        row = json.loads(line)
        found.setdefault(row["kernel"], {})[row["target"]] = row
    targets = list(next(iter(found.values()), {}))
    if partial := [name for name, by in found.items() if list(by) != targets] or not targets:
        sys.exit(f"triton-report: wanted the lines of tests/triton_compiled.py for all targets, got {partial}")
    rows = []
    for name, by in found.items():
        shares = [f"{row['share']:.0%}" for row in by.values()]
        figures = [[row[what] for row in by.values()] for what in ("registers", "spills")]
        rows.append(f"| {name} | {each(figures[0])} | {each(figures[1])} | {each(shares)} |")
    PAGE.write_text(TEXT.format(version=triton.__version__, targets=" / ".join(targets), rows="\n".join(rows)))
    print(f"written: docs/{PAGE.name}")


if __name__ == "__main__":
    main(sys.stdin)
