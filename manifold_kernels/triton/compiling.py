"""Kernels compiled for machines that are not there, and what the binaries say: registers, spills, widths of loads."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from manifold_kernels.triton.launch import OPTIONS
from manifold_kernels.triton.planning import Kernel

#: NVIDIA's compute capabilities and AMD's architecture that the kernels are compiled for in the tests.
TARGETS: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

#: Types of a step's arguments that are not pointers to int64, and of a decomposition's.
STEP = {"scales": "*fp64", "hyper": "*fp64", "partials": "*fp64", "totals": "*fp64", "norms": "*fp64"}
DECOMPOSITIONS = {
    torch.float32: {"x": "*fp32", "q": "*fp32", "r": "*fp32", "count": "i32"},
    torch.float64: {"x": "*fp64", "q": "*fp64", "r": "*fp64", "count": "i32"},
}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes. ``spills`` are bytes (NVIDIA) or registers (AMD) in local memory."""

    registers: int
    spills: int
    loads: Counter[int]
    stores: Counter[int]
    multiply_adds: int

    def share(self) -> float:
        """The share of 16-byte loads and stores, those of 8 bytes, which are numbers of the tables, left out."""
        both = self.loads + self.stores
        return both[128] / max(sum(both.values()) - both[64], 1)


def compile_kernel(
    kernel: Kernel, target: str, types: Mapping[str, str] = STEP, options: Mapping[str, Any] = OPTIONS
) -> Resources:
    """Compile ``kernel`` for one of :data:`TARGETS`; needs no GPU, and no interpreter in its place.

    ``types``: of arguments that are neither constants nor pointers to int64.
    """
    names: list[str] = kernel.function.arg_names
    constants = dict(kernel.constants)
    signature = {name: "constexpr" if name in constants else types.get(name, "*i64") for name in names}
    source = ASTSource(kernel.function, signature, {(names.index(name),): value for name, value in constants.items()})
    on = TARGETS[target]
    made = triton.compile(source, target=on, options={**options, "num_warps": kernel.warps})
    return _of_nvidia(made.asm["ptx"], made.asm["cubin"]) if on.backend == "cuda" else _of_amd(made.asm["amdgcn"])


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _of_nvidia(ptx: str, cubin: bytes) -> Resources:
    architecture = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0]
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        binary.write_bytes(cubin)
        # Triton's own call of ptxas, once more: only its report tells spills from other uses of local memory.
        assembler = "ptxas-blackwell" if architecture.startswith("sm_10") else "ptxas"
        command = [_tool(assembler), "-v", "--fmad=false", f"--gpu-name={architecture}", str(source), "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        code = subprocess.run([_tool("nvdisasm"), "-c", str(binary)], capture_output=True, text=True, check=True).stdout
    registers = int(re.findall(r"Used (\d+) registers", report)[0])
    spills = sum(int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", report))
    widths = {kind: Counter(_width(m) for m in re.findall(rf"\b{kind}\.E(\S*)", code)) for kind in ("LDG", "STG")}
    return Resources(registers, spills, widths["LDG"], widths["STG"], len(re.findall(r"\b[FD]FMA\b", code)))


def _width(modifiers: str) -> int:
    return next((bits for bits in (256, 128, 64) if f".{bits}" in modifiers), 16 if ".U16" in modifiers else 32)


def _of_amd(assembly: str) -> Resources:
    registers, spills = (
        int(re.findall(rf"\.{name}:\s*(\d+)", assembly)[0]) for name in ("vgpr_count", "vgpr_spill_count")
    )
    widths = {"short": 16, "ushort": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    loads, stores = (
        Counter(widths[m] for m in re.findall(rf"\bglobal_{kind}_(u?short|dword(?:x\d)?)", assembly))
        for kind in ("load", "store")
    )
    return Resources(registers, spills, loads, stores, len(re.findall(r"\bv_(?:pk_)?fmac?_f(?:32|64)", assembly)))
