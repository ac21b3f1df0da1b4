"""The CUDA kernels compiled for GPUs that are not there, and what the binaries say: registers, spills, widths of loads.

nvcc compiles every ``csrc/cuda/*.cu`` with the flags of setup.py, into ``build/cubins``, again only where a source has
changed; its assembler reports registers and spills, and Triton's package brings the disassembler for the rest.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from cuda_listing import Instruction, listings, plain

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

_MANIFOLDS = ("euclidean", "sphere", "oblique", "stiefel")
_RETRACTIONS = ("", "projection", "qr", "polar", "cayley", "exp")

#: Asks the headers for the threads and the dynamic shared memory of a block with matrices of e elements, in steps and
#: in decompositions.
_PROBE = """
#include <cstdio>
#include "cuda/decompose_registers.cuh"
#include "cuda/small.cuh"
int main() {
  using namespace mk::cuda;
  std::printf("small 0 %d 0 0\\nin_registers 0 %d 0 0\\n", block_threads, block_threads);
  for (int e = 1; e <= 64; e++) {
    std::printf("small %d %d %zu %zu\\n", e, small_threads(e), small_shared<float>(e), small_shared<double>(e));
    const size_t numbers = size_t(register_threads(e)) * odd_numbers(e, 1);
    std::printf("in_registers %d %d %zu %zu\\n", e, register_threads(e), 4 * numbers, 8 * numbers);
  }
}
"""


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes; bytes where it is memory.

    ``name`` is that of ``csrc/cuda/kernels.h``, without the manifold's retraction where it is none; ``elements`` those
    of a thread's matrix, 0 where threads share one. ``shared`` is what the kernel has ``declared``, with the dynamic
    part, which for the kernels of matrices in shared memory depends on the matrices and is left out. ``loads`` and
    ``stores`` count instructions by their bits, those of all storage types and layouts.
    """

    name: str
    architecture: str
    wide: bool
    elements: int
    registers: int
    spills: int
    stack: int
    declared: int
    shared: int
    threads: int
    loads: Counter[int]
    stores: Counter[int]


def missing() -> str | None:
    """Why nothing can be compiled or read here, or ``None``."""
    if shutil.which("nvcc") is None:
        return "nvcc is not installed"
    if find_spec("triton") is None:
        return "triton, which brings cuobjdump, is not installed"
    return None if shutil.which("c++filt") else "c++filt (binutils) is not installed"


def resources(architecture: str) -> list[Resources]:
    """Compile every kernel for ``architecture``, as in ``"sm_90"``, and read what it takes."""
    cubins = compiled(sorted(CUDA.glob("*.cu")), architecture)
    return sorted((one for cubin in cubins for one in _read(cubin)), key=lambda one: one.name)


def nvcc_release() -> str:
    """The release of nvcc, as in ``"13.0"``."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    if found is None:
        raise LookupError(f"nvcc --version: wanted a release, got {said!r}.")
    return found[1]


def _flags() -> list[str]:
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NVCC_FLAGS":
            assert isinstance(node.value, ast.Call)
            return shlex.split(ast.literal_eval(node.value.args[0]))
    raise LookupError("setup.py: wanted NVCC_FLAGS, got none.")


def compiled(sources: Sequence[Path], architecture: str) -> list[Path]:
    """The cubins of ``sources``, compiled where a source or a flag has changed since the last time."""
    import ninja
    from ninja.ninja_syntax import Writer

    folder = ROOT / "build" / "cubins" / sources[0].parent.name / architecture
    folder.mkdir(parents=True, exist_ok=True)
    cubins = [folder / f"{source.stem}.cubin" for source in sources]
    flags = shlex.join([*_flags(), f"-I{ROOT / 'csrc'}", f"-arch={architecture}"])
    with (folder / "build.ninja").open("w") as file:
        writer = Writer(file, width=10**6)
        command = f"nvcc -cubin -Xptxas=-v {flags} -MD -MF $out.d $in -o $out 2> $out.log || (cat $out.log; false)"
        writer.rule("nvcc", command, depfile="$out.d", deps="gcc")
        for source, cubin in zip(sources, cubins, strict=True):
            writer.build(str(cubin), "nvcc", str(source))
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-j", jobs, "-C", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed for {architecture}:\n{done.stdout[-8000:]}")
    return cubins


@lru_cache(maxsize=1)
def _blocks() -> dict[tuple[str, int], tuple[int, int, int]]:
    """Threads and dynamic shared memory (float, double) of a block, by the elements of a thread's matrix."""
    folder = ROOT / "build" / "cubins"
    source, program = folder / "probe.cu", folder / "probe"
    source.write_text(_PROBE)
    subprocess.run(["nvcc", *_flags(), f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    lines = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [(kernel, *map(int, numbers)) for kernel, *numbers in map(str.split, lines)]
    return {(kernel, elements): (threads, narrow, wide) for kernel, elements, threads, narrow, wide in rows}


def _read(cubin: Path) -> list[Resources]:
    log = Path(f"{cubin}.log").read_text()
    reports = {
        name: text
        for name, text in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", log, re.DOTALL)
    }
    code = listings(cubin)
    assert reports and reports.keys() <= code.keys(), (cubin, reports.keys() - code.keys())
    return [
        _of(readable, cubin, reports[name], code[name]) for name, readable in zip(reports, plain(reports), strict=True)
    ]


def _of(signature: str, cubin: Path, report: str, code: list[Instruction]) -> Resources:
    name, wide, elements = name_of(signature, cubin.stem)
    threads, *dynamic = _blocks()["in_registers" if "in_registers" in signature else "small", elements]
    threads = next((number for kernel, number in _THREADS if re.search(kernel, signature)), threads)
    # Functions that the kernel calls are reported beside it, with stacks and spills of their own.
    numbers = {kind: [int(n) for n in re.findall(rf"(\d+) bytes {kind}", report)] for kind in _MEMORY}
    declared = max(numbers["smem"], default=0)
    return Resources(
        name,
        cubin.parent.name,
        wide,
        elements,
        registers=max(int(n) for n in re.findall(r"Used (\d+) registers", report)),
        spills=sum(numbers["spill stores"]) + sum(numbers["spill loads"]),
        stack=max(numbers["stack frame"]),
        declared=declared,
        shared=declared + dynamic[wide],
        threads=threads,
        loads=Counter(bits for one in code if (bits := one.global_bits("LD"))),
        stores=Counter(bits for one in code if (bits := one.global_bits("ST"))),
    )


#: Blocks of decompose_threads.cu and decompose_teams.cu that are others than most.
_THREADS = (("by_threads", 32), ("by_teams.*Team<32>", 64))
_MEMORY = ("stack frame", "spill stores", "spill loads", "smem")


def name_of(signature: str, source: str) -> tuple[str, bool, int]:
    """The kernel's name, whether it computes in double, and the elements of a thread's matrix."""
    function = re.findall(r"mk::cuda::(?:\(anonymous namespace\)::)?(\w+)", signature)[0]
    if function == "advance":
        return function, False, 0
    if found := re.findall(r"\(mk::Decomposition\)(\d)", signature):
        return _decomposition(function, ("qr", "polar")[int(found[0])], signature)
    wide = "<double" in signature
    passes = re.findall(r"\(mk::cuda::Pass\)(\d)", signature)
    step = not passes or passes[0] == "1"
    end = f"{'double' if wide else 'float'} {'step' if step else 'measure'}"
    if function not in ("small", "route"):
        team = re.findall(r"Team<(\d+)>", signature)[:1]
        # The sources with rows of other rules have a kernel of that name each.
        return " ".join([source if function == "rows" else function, *team, end]), wide, 0
    manifold = next(name for name in _MANIFOLDS if f"{name.capitalize()}Map" in signature)
    n, p = map(int, re.findall(r", (\d+), (\d+), ", signature)[0])
    retraction = re.findall(r"\(mk::Retraction\)(\d)", signature)
    way = _RETRACTIONS[int(retraction[0])] if retraction else "exp" if "Map<true>" in signature else "projection"
    return " ".join(["small", manifold, *([way] if step else []), f"{n}x{p}", end]), wide, n * p


def _decomposition(function: str, what: str, signature: str) -> tuple[str, bool, int]:
    """As :func:`name_of`, of the kernels for batches."""
    number, sizes = re.findall(r", (float|double)([^>]*)>", signature)[0]
    side = int(re.findall(r"\d+", sizes)[0]) if function == "in_registers" else 0
    who = {"in_registers": f"{side}x{side}", "by_threads": "thread"}.get(function) or re.findall(r"Team<(\d+)", sizes)[
        0
    ]
    return f"{what} {who} {number}", number == "double", side * side
