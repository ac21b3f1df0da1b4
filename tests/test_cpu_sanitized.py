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
        "PYTHONPATH": str(tmp_path),
    }
    tests = [str(ROOT / "tests" / name) for name in ("test_cpu_kernels.py", "test_cpu_contract.py")]
    # Profilers and processor times are not what this is about.
    skipped = "not allocates_nothing and not share_a_step"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "-k", skipped, *tests]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    where = [sys.executable, "-c", "from manifold_kernels import _C; print(_C.__file__)"]
    loaded = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    assert str(tmp_path) in loaded, "the sanitized kernels were not the ones that were tested"
