"""Builds ``manifold_kernels._C``, the C++ kernels; everything that is not about compiling stands in pyproject.toml.

What is built follows from what is there:

* Linux on x86-64 or aarch64 with a C++ compiler: the kernels. A compiler that fails makes the installation fail.
* nvcc and a torch built for CUDA, too: the CUDA kernels (``CUDA_HOME``, or the nvcc on the path; no GPU is needed).
* No compiler, or another platform: pure Python, which ``manifold-kernels info`` reports.
* ``MANIFOLD_KERNELS_SKIP_BUILD=1``: pure Python.

Environment: ``CXX`` (the compiler), ``CXXFLAGS`` and ``LDFLAGS`` (appended), ``MAX_JOBS`` (compilations at a time),
``TORCH_CUDA_ARCH_LIST`` (compute capabilities, as in ``"8.0;9.0+PTX"``; by default those of the GPUs that are there, or
else ``ARCHITECTURES``), ``NVCC_CCBIN`` and ``NVCC_APPEND_FLAGS`` (nvcc reads them itself).

Torch's ``BuildExtension`` has one set of flags for an extension, but the kernels are compiled once for every
instruction set; so this file writes ninja's build file itself.
"""

from __future__ import annotations

import io
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
TORCH_MINIMUM = "2.13"
INSTALL = "pip install --no-build-isolation ."

#: Flags of every object. Kernels say themselves where they want a fused multiply-add (-ffp-contract=off), and give the
#: same bits on every machine (no -ffast-math). Torch's parallel_for is silently serial without -fopenmp.
FLAGS = shlex.split(
    "-std=c++20 -O3 -fPIC -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra "
    "-Wno-maybe-uninitialized -Wno-uninitialized "  # GCC 12 finds its own AVX-512 headers guilty of it
    "-DTORCH_EXTENSION_NAME=_C -DTORCH_API_INCLUDE_EXTENSION_H"
)

#: Small matrices live in registers only where every loop over one is unrolled; GCC stops at 16 rounds by itself, which
#: made 5x5 and 7x7 two to three times slower. For the sources of csrc/cpu/isa that know their sizes.
UNROLLING = shlex.split("--param=max-completely-peel-times=64 --param=max-completely-peeled-insns=4000")

#: Sources in csrc/cpu/isa are compiled once for each of these, with -DMK_ISA=<name>; the others once.
INSTRUCTION_SETS: dict[str, dict[str, list[str]]] = {
    "x86_64": {
        "baseline": [],
        "avx2": shlex.split("-mavx2 -mfma -mf16c"),
        "avx512": shlex.split("-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"),
    },
    "aarch64": {"baseline": []},
}


#: Flags of the CUDA kernels: as for the CPU's, the kernels say themselves where they want a fused multiply-add.
NVCC_FLAGS = shlex.split("-std=c++20 -O3 --fmad=false --expt-relaxed-constexpr -Xcompiler=-fPIC")

#: What CUDA kernels are compiled for where no GPU is there: A100 (the rest of Ampere, and Ada, run that, too), H100,
#: and by way of PTX those that come after it. Others have to be asked for: each one is minutes of compiling.
ARCHITECTURES = "8.0;9.0+PTX"


def find_compiler() -> list[str] | None:
    """The command of the C++ compiler: ``CXX``, or the first that is installed."""
    if chosen := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(chosen[0]) is None:
            raise SetupError(f"CXX: wanted an installed C++ compiler, got {chosen[0]!r}. Unset it or correct it.")
        return chosen
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def reason_for_pure_python() -> str | None:
    """Why nothing is to be compiled here, or ``None`` where the kernels are to be built."""
    if (skip := os.environ.get("MANIFOLD_KERNELS_SKIP_BUILD", "0")) not in ("", "0"):
        return f"MANIFOLD_KERNELS_SKIP_BUILD={skip}"
    if sys.platform != "linux" or platform.machine() not in INSTRUCTION_SETS:
        known = " and ".join(INSTRUCTION_SETS)
        return f"no kernels for {sys.platform} on {platform.machine()}, only for Linux on {known}"
    if find_compiler() is None:
        return "no C++ compiler found (c++, g++, clang++ or CXX)"
    return None


def jobs() -> int:
    wanted = os.environ.get("MAX_JOBS", "")
    if wanted and not (wanted.isdigit() and int(wanted) > 0):
        raise SetupError(f"MAX_JOBS: wanted a whole number > 0, got {wanted!r}.")
    return int(wanted) if wanted else len(os.sched_getaffinity(0))


def find_nvcc() -> Path | None:
    """nvcc: that of ``CUDA_HOME``, or the one on the path."""
    if home := os.environ.get("CUDA_HOME"):
        if not (nvcc := Path(home, "bin", "nvcc")).exists():
            raise SetupError(f"CUDA_HOME: wanted a CUDA toolkit with bin/nvcc, got {home!r}. Unset it or correct it.")
        return nvcc
    return Path(found) if (found := shutil.which("nvcc")) else None


def toolkit(nvcc: Path) -> tuple[Path, str]:
    """The folder with the headers and libraries that ``nvcc`` compiles with, and its release.

    nvcc itself knows: what lies on the path may be a wrapper from elsewhere.
    """
    trial = subprocess.run([str(nvcc), "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
    version = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True)
    top, release = re.search(r"^#\$ TOP=(.*)$", trial.stderr, re.M), re.search(r"release (\d+\.\d+)", version.stdout)
    if top is None or release is None:
        raise SetupError(f"nvcc: wanted a working compiler, got {nvcc}, which says {trial.stderr[-500:]!r}.")
    return Path(top[1]).resolve(), release[1]


class Cuda:
    """What CUDA kernels are compiled with; ``reason`` says why none are, where none are."""

    def __init__(self, torch: ModuleType) -> None:
        self.reason: str | None = None
        self.nvcc = find_nvcc()
        if torch.version.cuda is None:
            self.reason = f"torch {torch.__version__} was built without CUDA"
        elif self.nvcc is None:
            self.reason = "no nvcc found (CUDA_HOME or the path)"
        else:
            self.top, self.release = toolkit(self.nvcc)
            if self.release.split(".")[0] != torch.version.cuda.split(".")[0]:
                self.reason = f"nvcc is of CUDA {self.release}, torch {torch.__version__} of {torch.version.cuda}"
        if self.reason is not None:
            return
        self.architectures = architectures(torch)

    @property
    def about(self) -> str:
        """For ``manifold-kernels info``."""
        return f"none: {self.reason}" if self.reason else f"nvcc {self.release}, {', '.join(self.architectures)}"

    def flags(self) -> list[str]:
        """Those of nvcc."""
        targets = []
        for number, ptx in ((name.partition("+")[0].replace(".", ""), "+" in name) for name in self.architectures):
            targets.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if ptx:
                targets.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return [*NVCC_FLAGS, *targets, f"-I{ROOT / 'csrc'}"]

    def libraries(self) -> list[str]:
        """What the extension is linked with. torch has loaded its own cudart before the extension asks for one."""
        return [*(f"-L{self.top / name}" for name in ("lib64", "lib")), "-ltorch_cuda", "-lc10_cuda", "-lcudart"]


def architectures(torch: ModuleType) -> list[str]:
    """The compute capabilities to compile for, ``"9.0"`` or ``"9.0+PTX"``."""
    here = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    default = ";".join(f"{major}.{minor}" for major, minor in sorted(here)) or ARCHITECTURES
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or default
    names = re.split(r"[;,\s]+", wanted.strip(";, "))
    for name in names:
        known = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", name)
        if known is None or float(known[1]) < 7.5:
            raise SetupError(
                f"TORCH_CUDA_ARCH_LIST: wanted compute capabilities from 7.5 on, as in '8.0;9.0+PTX', got {wanted!r}."
            )
    return names


class BuildPython(build_py):
    """Says why there are no kernels, where there are none."""

    def run(self) -> None:
        if PURE_PYTHON is not None:
            print(f"manifold_kernels: pure Python, no compiled kernels: {PURE_PYTHON}.", file=sys.stderr, flush=True)
        super().run()


class BuildKernels(build_ext):
    """Compiles csrc/ for every instruction set and links the objects to ``manifold_kernels._C``."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import torch
            from torch.utils import cpp_extension
        except ImportError as error:
            # Build isolation hides the installed torch; another one fetched to build with might not match it.
            raise SetupError(
                "manifold_kernels: torch is not there to build with, and the kernels must be built with the torch that "
                f"they will run with. Install torch >= {TORCH_MINIMUM}, setuptools and wheel, then run\n    {INSTALL}\n"
                "(MANIFOLD_KERNELS_SKIP_BUILD=1 installs without the compiled kernels.)"
            ) from error
        if torch.__version__ < TORCH_MINIMUM:  # a TorchVersion, which compares as versions do
            raise SetupError(f"torch: wanted {TORCH_MINIMUM} or newer to build with, got {torch.__version__}.")

        try:
            import ninja
            from ninja.ninja_syntax import Writer
        except ImportError as error:
            raise SetupError(
                f"manifold_kernels: ninja is not there to build with. Install it, then\n    {INSTALL}"
            ) from error

        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        build = (
            ROOT / "build" / f"objects-{sysconfig.get_platform()}-{sys.implementation.cache_tag}-{torch.__version__}"
        )
        build.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        self.describe(Writer(text), library, torch, cpp_extension)
        (build / "build.ninja").write_text(text.getvalue())
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-v", "-j", str(jobs()), "-C", str(build)]
        if subprocess.run(command).returncode:
            raise CompileError(
                "manifold_kernels: the compiler failed, see above. MANIFOLD_KERNELS_SKIP_BUILD=1 installs without the "
                "compiled kernels."
            )

    @staticmethod
    def describe(ninja: Any, library: Path, torch: ModuleType, cpp_extension: ModuleType) -> None:
        """Writes the build file: an object for every source and instruction set, and the library of them all.

        Of an inline function that several objects hold the linker keeps the first, so that wider instruction sets come
        last: else a ``std::vector`` of the AVX-512 object could be called on a machine without AVX-512.
        """
        compiler = find_compiler()
        assert compiler is not None  # else there is no extension to build
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
        python = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
        cuda = Cuda(torch)
        print(f"manifold_kernels: CUDA kernels: {cuda.about}.", file=sys.stderr, flush=True)
        flags = [
            *FLAGS,
            f"-I{ROOT / 'csrc'}",
            *(f"-isystem{path}" for path in (*cpp_extension.include_paths(), *sorted(python))),
            f'-DMK_BUILD_COMPILER="{version}"',
            f'-DMK_BUILD_TORCH="{torch.__version__}"',
        ]
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        # With a libgomp of its own (torch's wheels bring theirs) the extension would have threads of its own, too.
        torch_root = Path(torch.__file__).parent
        gomp = sorted([*torch_root.glob("lib/libgomp*.so*"), *torch_root.parent.glob("torch.libs/libgomp*.so*")])
        link = [
            *(f"-L{path}" for path in cpp_extension.library_paths()),
            *("-ltorch_python", "-ltorch", "-ltorch_cpu", "-lc10"),
            *([] if cuda.reason else cuda.libraries()),
            *map(str, gomp),
            "-fopenmp",
            *shlex.split(os.environ.get("LDFLAGS", "")),
        ]

        ninja.rule("compile", "$cxx $flags -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
        ninja.rule("nvcc", "$nvcc $flags -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
        ninja.rule("link", "$cxx -shared $in $flags -o $out")
        ninja.variable("cxx", quoted(compiler))
        objects: list[tuple[Path, Path, list[str]]] = []
        kernels: list[tuple[Path, Path, list[str]]] = []
        host = list(flags)
        if cuda.reason is None:
            host += [f'-DMK_BUILD_CUDA="{cuda.about}"', f"-isystem{cuda.top / 'include'}"]
            ninja.variable("nvcc", quoted([str(cuda.nvcc)]))
            for source in map(Path, CUDA_SOURCES):
                if source.suffix == ".cu":
                    kernels.append((source.with_suffix(".cu.o"), source, cuda.flags()))
                else:
                    objects.append((source.with_suffix(".o"), source, [*host, *extra]))
        for source in map(Path, SOURCES):
            if source.parent != Path("csrc/cpu/isa"):
                objects.append((source.with_suffix(".o"), source, [*host, *extra]))
        for name, instructions in INSTRUCTION_SETS[platform.machine()].items():
            for source in map(Path, SOURCES):
                if source.parent == Path("csrc/cpu/isa"):
                    unrolling = UNROLLING if source.stem.startswith("lanes_") and "clang" not in version else []
                    here = [*flags, f"-DMK_ISA={name}", *instructions, *unrolling, *extra]
                    objects.append((source.parent / name / f"{source.stem}.o", source, here))
        for path, source, arguments in kernels:
            ninja.build(str(path), "nvcc", str(ROOT / source), variables={"flags": quoted(arguments)})
        for path, source, arguments in reversed(objects):  # the widest instruction set takes longest
            ninja.build(str(path), "compile", str(ROOT / source), variables={"flags": quoted(arguments)})
        ninja.build(
            str(library), "link", [str(path) for path, _, _ in (*objects, *kernels)], variables={"flags": quoted(link)}
        )


def quoted(arguments: list[str]) -> str:
    """``arguments`` for the shell that ninja calls."""
    return shlex.join(arguments).replace("$", "$$")


SOURCES = sorted(
    str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp") if path.parent != ROOT / "csrc" / "cuda"
)
CUDA_SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.c*") if path.suffix != ".cuh")
PURE_PYTHON = reason_for_pure_python()

setup(
    ext_modules=[] if PURE_PYTHON is not None else [Extension("manifold_kernels._C", SOURCES)],
    cmdclass={"build_py": BuildPython, "build_ext": BuildKernels},
)
