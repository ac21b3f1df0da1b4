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
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

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
    of a thread's matrix, 0 where threads share one. ``shared`` has the dynamic part, which for the kernels of matrices
    in shared memory depends on the matrices and is left out. ``loads`` and ``stores`` count instructions by their bits.
    """

    name: str
    architecture: str
    wide: bool
    elements: int
    registers: int
    spills: int
    stack: int
    shared: int
    threads: int
    instructions: int
    arithmetic: int
    loads: Counter[int]
    stores: Counter[int]

    def share(self) -> float:
        """The share of the 16-byte ones in the bytes of all global loads and stores, each instruction counted once.

        Reads of tables and the paths of unaligned tensors and of tails are among them, none of which a contiguous
        tensor takes for more than a few of its elements.
        """
        both = self.loads + self.stores
        return 128 * both[128] / max(sum(bits * count for bits, count in both.items()), 1)


def missing() -> str | None:
    """Why nothing can be compiled or read here, or ``None``."""
    if shutil.which("nvcc") is None:
        return "nvcc is not installed"
    if find_spec("triton") is None:
        return "triton, which brings cuobjdump, is not installed"
    return None if shutil.which("c++filt") else "c++filt (binutils) is not installed"


def resources(architecture: str) -> list[Resources]:
    """Compile every kernel for ``architecture``, as in ``"sm_90"``, and read what it takes."""
    folder = ROOT / "build" / "cubins" / architecture
    _compile(architecture, folder)
    return sorted((one for cubin in sorted(folder.glob("*.cubin")) for one in _read(cubin)), key=lambda one: one.name)


def _flags() -> list[str]:
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NVCC_FLAGS":
            assert isinstance(node.value, ast.Call)
            return shlex.split(ast.literal_eval(node.value.args[0]))
    raise LookupError("setup.py: wanted NVCC_FLAGS, got none.")


def _compile(architecture: str, folder: Path) -> None:
    import ninja
    from ninja.ninja_syntax import Writer

    folder.mkdir(parents=True, exist_ok=True)
    flags = shlex.join([*_flags(), f"-I{ROOT / 'csrc'}", f"-arch={architecture}"])
    with (folder / "build.ninja").open("w") as file:
        writer = Writer(file, width=10**6)
        command = f"nvcc -cubin -Xptxas=-v {flags} -MD -MF $out.d $in -o $out 2> $out.log || (cat $out.log; false)"
        writer.rule("nvcc", command, depfile="$out.d", deps="gcc")
        for source in sorted(CUDA.glob("*.cu")):
            writer.build(str(folder / f"{source.stem}.cubin"), "nvcc", str(source))
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    done = subprocess.run(
        [str(Path(ninja.BIN_DIR) / "ninja"), "-j", jobs, "-C", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"nvcc failed for {architecture}:\n{done.stdout[-8000:]}")


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
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    code = subprocess.run([str(tool), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    log = Path(f"{cubin}.log").read_text()
    reports = {
        name: text
        for name, text in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", log, re.DOTALL)
    }
    listings = dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\s*Function : |\Z)", code, re.DOTALL))
    assert reports and reports.keys() <= listings.keys(), (cubin, reports.keys() - listings.keys())
    plain = subprocess.run(["c++filt"], input="\n".join(reports), capture_output=True, text=True, check=True).stdout
    return [
        _of(readable, cubin, reports[name], listings[name])
        for name, readable in zip(reports, plain.splitlines(), strict=True)
    ]


def _of(signature: str, cubin: Path, report: str, listing: str) -> Resources:
    name, wide, elements = _name(signature, cubin.stem)
    threads, *dynamic = _blocks()["in_registers" if "in_registers" in signature else "small", elements]
    threads = next((number for kernel, number in _THREADS if re.search(kernel, signature)), threads)
    # Functions that the kernel calls are reported beside it, with stacks and spills of their own.
    numbers = {kind: [int(n) for n in re.findall(rf"(\d+) bytes {kind}", report)] for kind in _MEMORY}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", listing, re.MULTILINE)
    opcodes = [opcode for opcode in opcodes if opcode not in ("NOP", "BRA.DIV")]
    return Resources(
        name,
        cubin.parent.name,
        wide,
        elements,
        registers=max(int(n) for n in re.findall(r"Used (\d+) registers", report)),
        spills=sum(numbers["spill stores"]) + sum(numbers["spill loads"]),
        stack=max(numbers["stack frame"]),
        shared=max(numbers["smem"], default=0) + dynamic[wide],
        threads=threads,
        instructions=len(opcodes),
        arithmetic=sum(opcode.startswith(_ARITHMETIC) for opcode in opcodes),
        loads=_widths(opcodes, "LD"),
        stores=_widths(opcodes, "ST"),
    )


#: Blocks of decompose_threads.cu and decompose_teams.cu that are others than most.
_THREADS = (("by_threads", 32), ("by_teams.*Team<32>", 64))
_MEMORY = ("stack frame", "spill stores", "spill loads", "smem")
_ARITHMETIC = ("FADD", "FMUL", "FFMA", "FSEL", "FSETP", "FMNMX", "MUFU", "DADD", "DMUL", "DFMA", "DSETP", "F2F")


def _widths(opcodes: list[str], kind: str) -> Counter[int]:
    """How many load or store how many bits of global memory; addresses out of tables are generic, without the G."""
    modifiers = [match[1] for opcode in opcodes if (match := re.fullmatch(rf"{kind}G?\.E(.*)", opcode))]
    return Counter(_bits(text) for text in modifiers)


def _bits(modifiers: str) -> int:
    small = {".U8": 8, ".S8": 8, ".U16": 16, ".S16": 16}
    wide = (bits for bits in (256, 128, 64) if f".{bits}" in modifiers)
    return next(wide, next((bits for text, bits in small.items() if text in modifiers), 32))


def _name(signature: str, source: str) -> tuple[str, bool, int]:
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
    if function != "small":
        team = re.findall(r"Team<(\d+)>", signature)[:1]
        # The sources with rows of other rules have a kernel of that name each.
        return " ".join([source if function == "rows" else function, *team, end]), wide, 0
    manifold = next(name for name in _MANIFOLDS if f"{name.capitalize()}Map" in signature)
    n, p = map(int, re.findall(r", (\d+), (\d+), ", signature)[0])
    retraction = re.findall(r"\(mk::Retraction\)(\d)", signature)
    way = _RETRACTIONS[int(retraction[0])] if retraction else "exp" if "Map<true>" in signature else "projection"
    return " ".join([function, manifold, *([way] if step else []), f"{n}x{p}", end]), wide, n * p


def _decomposition(function: str, what: str, signature: str) -> tuple[str, bool, int]:
    """As :func:`_name`, of the kernels for batches."""
    number, sizes = re.findall(r", (float|double)([^>]*)>", signature)[0]
    side = int(re.findall(r"\d+", sizes)[0]) if function == "in_registers" else 0
    who = {"in_registers": f"{side}x{side}", "by_threads": "thread"}.get(function) or re.findall(r"Team<(\d+)", sizes)[
        0
    ]
    return f"{what} {who} {number}", number == "double", side * side
