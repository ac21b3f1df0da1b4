"""The CUDA kernels under sanitizers: AddressSanitizer sees what they touch, ThreadSanitizer what no barrier orders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cuda_emulated
import pytest
from cuda_emulated import ROOT, build
from test_cpu_sanitized import library

if (reason := cuda_emulated.missing()) is not None:
    pytest.skip(f"the CUDA kernels cannot be compiled for the CPU: {reason}", allow_module_level=True)

#: The tests that go every way through memory, in every order of blocks and threads.
WAYS = "any_order or views or filters"

FILES = ("kernels", "contract", "functional", "graphs")

#: The run-time library that has to be loaded first, its options, and the tests: minutes of them.
RUNS = [
    (
        "address",
        "libasan.so",
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
        f"{WAYS} or between or huge or misaligned_batches or replayed",
    ),
    # Python and torch themselves are not what is watched.
    ("thread", "libtsan.so", {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}, WAYS),
]


@pytest.mark.long
@pytest.mark.parametrize(("sanitizer", "runtime", "options", "chosen"), RUNS, ids=[run[0] for run in RUNS])
def test_steps_under_a_sanitizer(
    sanitizer: str, runtime: str, options: dict[str, str], chosen: str, tmp_path: Path
) -> None:
    preloaded = library(runtime)
    if os.sep not in preloaded:
        pytest.skip(f"the compiler has no {runtime}")
    environment = {
        **os.environ,
        # What it finds goes to a file: pytest keeps what the process that ends so has written.
        **{name: f"{text}:log_path={tmp_path / 'found'}" for name, text in options.items()},
        # The C++ library, so that the sanitizer finds the functions behind an exception before Python loads it.
        "LD_PRELOAD": f"{preloaded} {library('libstdc++.so')}",
        "MANIFOLD_KERNELS_EMULATED": str(build(sanitizer)),
        "OMP_NUM_THREADS": "1",
    }
    tests = [str(ROOT / "tests" / f"test_cuda_{name}.py") for name in FILES]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "-k", chosen, *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = "".join(file.read_text()[:6000] for file in tmp_path.glob("found*"))
    assert done.returncode == 0, found + done.stdout[-6000:] + done.stderr[-6000:]
