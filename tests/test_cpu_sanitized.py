"""The kernels built with AddressSanitizer and UndefinedBehaviorSanitizer, and the tests of the steps on them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from manifold_kernels import ops

ROOT = Path(__file__).resolve().parents[1]
COMPILER = os.environ.get("CXX") or "c++"

if (missing := ops.extension_error()) is not None:
    pytest.skip(f"the compiled kernels are not there: {missing}", allow_module_level=True)

#: A gradient whose memory was given back behind the tensor's back: it must be seen, or the kernels are not sanitized.
BUG = """
import torch
from cpu_lockstep import call, compiled
from manifold_kernels import _C
from manifold_kernels.plan import Plan
from stepping import group, hyper_table, start

weight, rows = torch.randn(2, 3, 3, 3), [group("sphere")]
run, grad = start([weight], rows, [{}]), torch.randn(2, 3, 3, 3)
grad.untyped_storage().resize_(100)
call(compiled, run, [grad], Plan.build(rows, [weight]), hyper_table([{}]))
"""


def library(name: str) -> str:
    """Where the compiler has one of its libraries; the bare name where it has not."""
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return str(Path(found).resolve()) if os.sep in found else found


@pytest.mark.long
def test_steps_under_sanitizers(tmp_path: Path) -> None:
    asan = library("libasan.so")
    if os.sep not in asan:
        pytest.skip(f"{COMPILER} has no AddressSanitizer")
    for name in ("csrc", "manifold_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    # vptr: torch's own classes carry no type information that would fit.
    sanitize = "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined"
    build = {
        **os.environ,
        "CXXFLAGS": f"-O1 -g1 -fno-omit-frame-pointer {sanitize}",
        "LDFLAGS": sanitize,
    }
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    environment = {
        **os.environ,
        # The C++ library, so that the sanitizer finds the functions behind an exception before Python loads it.
        "LD_PRELOAD": f"{asan} {library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's and torch's
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "tests")]),
    }
    seeded = subprocess.run([sys.executable, "-c", BUG], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "ERROR: AddressSanitizer" in seeded.stderr, seeded.stdout + seeded.stderr[-4000:]
    tests = [str(ROOT / "tests" / name) for name in ("test_cpu_kernels.py", "test_cpu_contract.py")]
    # Profilers and processor times are not what this is about.
    skipped = "not allocates_nothing and not share_a_step"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "-k", skipped, *tests]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
