"""What importing the package takes along: little beside torch, and no compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

#: Each takes longer to import than all of the package: tables, other random numbers, kernels for machines, plots.
HEAVY = ("rich", "numpy.random", "triton", "matplotlib", "mlxtend", "typer", "scipy", "sklearn", "hypothesis", "pdoc")


def test_nothing_heavy_is_imported_with_the_package() -> None:
    """The figure of docs/packaging.md rests on it: the package itself is some dozens of small modules."""
    code = (
        "import sys, subprocess\n"
        "import torch, torch.optim\n"
        "before = set(sys.modules)\n"
        "def refuse(*a, **k): raise AssertionError('a process was started at import')\n"
        "subprocess.Popen = refuse\n"
        "import manifold_kernels\n"
        "new = set(sys.modules) - before\n"
        f"heavy = [name for name in {HEAVY!r} if name in new]\n"
        "print(heavy, len([name for name in new if not name.startswith('manifold_kernels')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr
    heavy, others = done.stdout.rsplit(" ", 1)
    assert heavy == "[]" and int(others) < 20, done.stdout
