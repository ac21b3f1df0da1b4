"""The CUDA backend on CPU tensors: the sources of ``csrc/cuda``, compiled as host C++ with one fiber for each thread.

``step_`` is the operator, launch planning included, and ``in_place_of_the_cpu`` puts all operators where the package
looks for those of CPU tensors; ``build`` compiles them, once for every state of the sources, into ``build/emulated``.
``emulated/emulator.h`` says what such a run shows and what it does not.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import ninja
import torch
from ninja.ninja_syntax import Writer
from torch import Tensor
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
EMULATOR = ROOT / "tests" / "emulated"
CUDA = ROOT / "csrc" / "cuda"
#: The emulator itself.
FIBERS = [EMULATOR / name for name in ("block.cpp", "collectives.cpp", "fibers.cpp", "launches.cpp")]
#: What the backend has in common with the CPU's.
SHARED = ("arguments.cpp", "functional.cpp", "cpu/geometry.cpp", "cpu/library.cpp")

#: Sanitizers by name: flags of the kernels, and those of the emulator, which tells ThreadSanitizer what orders what.
#: The host's side is the same for all of them.
SANITIZERS: dict[str, tuple[str, str]] = {
    "none": ("", ""),
    "address": ("-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all -g1",) * 2,
    "thread": ("-fsanitize=thread -g1", ""),
}

FLAGS = (
    "-std=c++20 -O1 -fPIC -fopenmp -ffp-contract=off -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas "
    "-Wno-maybe-uninitialized -DMK_EMULATED"
) + (" -mfma" if platform.machine() == "x86_64" else "")


def compiler() -> str:
    """The command of the C++ compiler."""
    return os.environ.get("CXX") or "c++"


def kernels(sanitizer: str) -> list[Path]:
    """The sources with kernels. With a sanitizer, which compiles slowly, small matrices have few sizes."""
    every = sorted(CUDA.glob("*.cu"))
    if sanitizer == "none":
        return every
    return [*(path for path in every if not path.stem.startswith("small_")), EMULATOR / "few_small.cpp"]


def host() -> list[Path]:
    """The host's side of the backend, and what stands in for CUDA's there."""
    own = [path for path in sorted(CUDA.glob("*.cpp")) if path.name not in ("context.cpp", "register.cpp")]
    emulator = [EMULATOR / name for name in ("context.cpp", "operators.cpp")]
    return [*own, *(ROOT / "csrc" / name for name in SHARED), *emulator]


def build(sanitizer: str = "none") -> Path:
    """The library with the emulated operators; compiled where a source or a flag has changed since the last time."""
    folder = ROOT / "build" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    include = " ".join(
        [f"-I{ROOT / 'csrc'} -I{EMULATOR}", *(f"-isystem{path}" for path in cpp_extension.include_paths())]
    )
    torch_library = Path(torch.__file__).parent / "lib"
    link = f"-shared -L{torch_library} -Wl,-rpath,{torch_library} -ltorch -ltorch_cpu -lc10 -fopenmp"
    with (folder / "build.ninja").open("w") as file:
        writer = Writer(file, width=10**6)
        writer.rule("compile", f"{compiler()} $flags -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
        writer.rule("link", f"{compiler()} $in {link} $flags -o $out")
        known: set[str] = set()

        def compiled(source: Path, name: str, flags: str) -> str:
            object_file = f"{name}/{source.stem}_{hashlib.sha1(str(source).encode()).hexdigest()[:6]}.o"
            if object_file not in known:
                known.add(object_file)
                writer.build(object_file, "compile", str(source), variables={"flags": f"{FLAGS} {flags} {include}"})
            return object_file

        for name, (of_kernels, of_emulator) in SANITIZERS.items():
            objects = [compiled(path, name, f"{of_kernels} -x c++") for path in kernels(name)]
            # They run at every barrier.
            objects += [compiled(path, name, f"-O2 {of_emulator}") for path in FIBERS]
            objects += [compiled(path, "host", "") for path in host()]
            writer.build(f"{name}/emulated.so", "link", objects, variables={"flags": of_kernels})
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    library = f"{sanitizer}/emulated.so"
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-j", jobs, "-C", str(folder), library]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}:\n{done.stdout[-8000:]}{done.stderr[-4000:]}")
    return folder / library


@lru_cache(maxsize=1)
def load() -> None:
    """Build the operators, unless ``MANIFOLD_KERNELS_EMULATED`` names a library with them, and load them."""
    torch.ops.load_library(os.environ.get("MANIFOLD_KERNELS_EMULATED") or str(build()))


def missing() -> str | None:
    """Why nothing can be built here, or ``None``."""
    return None if shutil.which(shlex.split(compiler())[0]) else f"{compiler()} is not installed"


def step_(*arguments: Sequence[Tensor] | Tensor | None) -> None:
    """The operator of ``ops.py``, with the gradient's scale and the flag of an overflow at its end."""
    load()
    torch.ops.manifold_kernels_emulated.step_(*arguments)


@contextmanager
def in_place_of_the_cpu() -> Iterator[None]:
    """While it lasts, the package's operators on CPU tensors are the emulated backend's."""
    load()
    library = torch.library.Library("manifold_kernels", "IMPL", "CPU")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
            for name in ("step_", "qr", "qf", "polar"):
                library.impl(name, _emulated(name), allow_override=True)
        yield
    finally:
        library._destroy()


def _emulated(name: str) -> Callable[..., object]:
    operator = getattr(torch.ops.manifold_kernels_emulated, name).default
    return lambda *arguments: operator(*arguments)


def set_schedule(seed: int) -> None:
    """Run blocks and threads in an order drawn from ``seed``; 0: one after the other."""
    load()
    torch.ops.manifold_kernels_emulated.set_schedule(seed)


def launched() -> list[int]:
    """The blocks of each launch since the last time that this was asked."""
    load()
    blocks: list[int] = torch.ops.manifold_kernels_emulated.launched()
    return blocks


def set_shared_memory(kilobytes: int) -> None:
    """How much shared memory a block can have, in KB: 64 on Turing, 99 to 163 on Ampere, 227 on an H100."""
    load()
    torch.ops.manifold_kernels_emulated.set_shared_memory(kilobytes << 10)


@contextmanager
def capturing() -> Iterator[Callable[[], None]]:
    """While it lasts, launches go into a CUDA graph in place of running; yields what runs that afterwards."""
    load()
    torch.ops.manifold_kernels_emulated.set_capturing(True)
    try:
        yield torch.ops.manifold_kernels_emulated.replay
    finally:
        torch.ops.manifold_kernels_emulated.set_capturing(False)
