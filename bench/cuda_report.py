"""What the CUDA kernels take on GPUs that are not there, and what that lets one expect: ``make cuda-report``.

Occupancy follows from registers, shared memory and threads of a block. Times are predictions, per element of a float32
(or float64) weight with momentum: from the bytes that a step must move at the memory's rated bandwidth, and from the
instructions of a thread at four a cycle and multiprocessor. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from cuda_resources import ARCHITECTURES, Resources, missing, resources
from rich.console import Console
from rich.table import Table

#: What a multiprocessor has, and the steps in which a warp gets registers (CUDA C++ Programming Guide, "Compute
#: Capabilities"); of its shared memory, in bytes, every block takes 1 KB for the system.
REGISTERS, WARPS, BLOCKS, REGISTER_STEP, SYSTEM_SHARED = 65536, 64, 32, 256, 1024
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}


@dataclass(frozen=True)
class Gpu:
    """Rated figures of NVIDIA's data sheets (SXM models)."""

    name: str
    architecture: str
    bandwidth: float  # bytes a second
    multiprocessors: int
    clock: float  # boost, in Hz

    def memory(self, moved: float) -> float:
        """Picoseconds to move ``moved`` bytes."""
        return moved / self.bandwidth * 1e12

    def issue(self, instructions: float) -> float:
        """Picoseconds an element to issue that many instructions of a thread; 32 threads share one."""
        return instructions / 32 / (4 * self.multiprocessors * self.clock) * 1e12


GPUS = (Gpu("A100", "sm_80", 2.0e12, 108, 1.41e9), Gpu("H100", "sm_90", 3.35e12, 132, 1.83e9))


def occupancy(kernel: Resources) -> float:
    """The share of a multiprocessor's warps that can be resident."""
    warps = kernel.threads // 32
    registers = -(-kernel.registers * 32 // REGISTER_STEP) * REGISTER_STEP * warps
    blocks = min(
        BLOCKS, WARPS // warps, REGISTERS // registers, SHARED[kernel.architecture] // (kernel.shared + SYSTEM_SHARED)
    )
    return blocks * warps / WARPS


def moved(kernel: Resources) -> int:
    """Bytes an element with momentum: W, gradient and momentum read, W and momentum written, as in Euclidean SGD.

    The pass before it, where a group is more than a block, reads the same and writes the momentum; Euclidean groups'
    writes nothing. Decompositions read a matrix and write Q and R, or the polar factor.
    """
    if kernel.name.startswith(("qr", "polar")):
        return (3 if kernel.name.startswith("qr") else 2) * (8 if kernel.wide else 4)
    numbers = 5 if kernel.name.endswith("step") else 3 if kernel.name.startswith("elements") else 4
    return numbers * (8 if kernel.wide else 4)


def table(architecture: str, kernels: list[Resources]) -> Table:
    """A line for each kernel."""
    gpus = [gpu for gpu in GPUS if gpu.architecture == architecture]
    out = Table(title=f"{architecture}: {len(kernels)} kernels", title_justify="left")
    out.add_column("kernel", no_wrap=True)
    headings = ["registers", "spills", "stack", "shared", "16-byte loads", "stores", "share", "instructions"]
    headings += ["an element", "of arithmetic", "occupancy", "bytes"]
    headings += [f"{gpu.name}, {what}" for gpu in gpus for what in ("memory ps", "issue ps")]
    for heading in headings:
        out.add_column(heading, justify="right")
    for kernel in kernels:
        row = [str(n) for n in (kernel.registers, kernel.spills, kernel.stack, kernel.shared)]
        row += [str(kernel.loads[128]), str(kernel.stores[128]), f"{kernel.share():.0%}", str(kernel.instructions)]
        each, sums = (
            (n / kernel.elements if kernel.elements else None) for n in (kernel.instructions, kernel.arithmetic)
        )
        row += ["" if n is None else f"{n:.0f}" for n in (each, sums)]
        row += [f"{occupancy(kernel):.0%}", "" if kernel.name == "advance" else str(moved(kernel))]
        for gpu in gpus if kernel.name != "advance" else ():
            row.append(f"{gpu.memory(moved(kernel)):.1f}")
            row.append("" if each is None or sums is None else f"{gpu.issue(sums):.1f} to {gpu.issue(each):.1f}")
        out.add_row(*row)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--kernels", default="", metavar="PATTERN", help="those whose name has this regular expression")
    options = parser.parse_args()
    if (reason := missing()) is not None:
        parser.exit(1, f"cuda-report: {reason}\n")
    console = Console(width=220)
    console.print(
        "Not measured on a GPU. Instructions are counted in the binary, the paths of all storage types and layouts "
        "among them; a step takes fewer, so that their time lies between that of the arithmetic and that of all."
    )
    for architecture in options.architectures:
        found = [kernel for kernel in resources(architecture) if re.search(options.kernels, kernel.name)]
        console.print(table(architecture, found))


if __name__ == "__main__":
    main()
