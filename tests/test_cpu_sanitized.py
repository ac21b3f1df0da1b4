"""The kernels built with sanitizers, and tests of the steps on them.

AddressSanitizer and UndefinedBehaviorSanitizer see what they touch, ThreadSanitizer what no thread waits for.
"""

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
FREED = """
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

#: A step of one round, one of two rounds, one matrix for all threads, and decompositions: each work for three threads.
SHARED = """
import torch
from manifold_kernels import functional
from test_cpu_threads import LARGE, large_run

torch.set_num_threads(3)
if {case} < len(LARGE):
    large_run(LARGE[{case}], torch.float32)
else:
    functional.qr(torch.randn(5000, 3, 3))
"""
CASES = {"one round": 1, "two rounds": 2, "one matrix": 12, "decompositions": 99}


def library(name: str) -> str:
    """Where the compiler has one of its libraries; the bare name where it has not."""
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return str(Path(found).resolve()) if os.sep in found else found


def runtime(name: str) -> str:
    """What has to be loaded first: the sanitizer's library, and the C++ library.

    The latter, so that the sanitizer finds the functions behind an exception before Python loads it.
    """
    found = library(name)
    if os.sep not in found:
        pytest.skip(f"{COMPILER} has no {name}")
    return f"{found} {library('libstdc++.so')}"


def build(folder: Path, sanitize: str, flags: str = "") -> None:
    """A copy of the package in ``folder``, with kernels that are compiled with ``sanitize``."""
    for name in ("csrc", "manifold_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    environment = {
        **os.environ,
        "CXXFLAGS": f"-O1 -g1 -fno-omit-frame-pointer {sanitize} {flags}",
        "LDFLAGS": sanitize,
    }
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python with the package in ``folder``."""
    everything = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=everything, capture_output=True, text=True)


def selected(chosen: str, *files: str) -> list[str]:
    return [
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-x",
        "-k",
        chosen,
        *(str(ROOT / "tests" / name) for name in files),
    ]


@pytest.mark.long
def test_steps_under_sanitizers(tmp_path: Path) -> None:
    first = runtime("libasan.so")
    # vptr: torch's own classes carry no type information that would fit. The others make unrolled kernels take many
    # times as long to compile, and what they find AddressSanitizer does when it is read or written.
    unwatched = "vptr,null,pointer-overflow,object-size"
    build(tmp_path, f"-fsanitize=address,undefined -fno-sanitize={unwatched} -fno-sanitize-recover=undefined")
    options = {
        "LD_PRELOAD": first,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's and torch's
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    seeded = run(tmp_path, "-c", FREED, **options)
    assert "ERROR: AddressSanitizer" in seeded.stderr, seeded.stdout + seeded.stderr[-4000:]
    # Processor times are not what this is about.
    files = ("kernels", "degenerate", "arguments", "threads")
    chosen = selected("not share_a_step", *(f"test_cpu_{name}.py" for name in files))
    done = run(tmp_path, *chosen, **options)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]


@pytest.mark.long
def test_threads_under_sanitizers(tmp_path: Path) -> None:
    """Threads of one step, of decompositions, and of several optimizers at once.

    ThreadSanitizer does not see what orders the threads of an OpenMP library that was built without it:
    ``tests/threads`` has threads that it knows for ``at::parallel_for``, the only way in which kernels start any.
    Python and torch are not what is watched.
    """
    first = runtime("libtsan.so")
    build(tmp_path, "-fsanitize=thread", f"-I{ROOT / 'tests' / 'threads'}")
    said = tmp_path / "said"
    options = {
        "LD_PRELOAD": first,
        "TSAN_OPTIONS": f"ignore_noninstrumented_modules=1 halt_on_error=1 exitcode=66 log_path={said}",
        "ATEN_CPU_CAPABILITY": "default",  # masked loads of wider instruction sets are not watched
    }
    for name, case in CASES.items():
        code = SHARED.format(case=case)
        seeded = run(tmp_path, "-c", code, MK_SEEDED_RACE="1", **options)
        reports = [each.read_text() for each in tmp_path.glob("said.*")]
        assert seeded.returncode == 66 and any("data race" in each for each in reports), (name, seeded.stderr[-4000:])
        for each in tmp_path.glob("said.*"):
            each.unlink()
    chosen = "number_of_threads or os_threads or optimizers_in_threads or same_bits_anywhere"
    done = run(
        tmp_path, *selected(chosen, "test_cpu_threads.py", "test_contract.py", "test_functional_qr.py"), **options
    )
    reports = [each.read_text() for each in tmp_path.glob("said.*")]
    assert done.returncode == 0 and not reports, done.stdout[-6000:] + "".join(reports)[-6000:]
