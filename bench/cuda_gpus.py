"""What GPUs offer to a kernel: memory, cycles, and room for warps. Rated figures, nothing is measured."""

from __future__ import annotations

from dataclasses import dataclass

from cuda_resources import Resources
from cuda_routes import Route

#: What a multiprocessor has, and the steps in which a warp gets registers (CUDA C++ Programming Guide, "Compute
#: Capabilities"); of its shared memory, in bytes, every block takes 1 KB for the system.
REGISTERS, WARPS, BLOCKS, REGISTER_STEP, SYSTEM_SHARED = 65536, 64, 32, 256, 1024
#: A guess at the nanoseconds from a load of memory to its number.
LATENCY = 600
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}


@dataclass(frozen=True)
class Gpu:
    """Figures of NVIDIA's data sheets (SXM models)."""

    name: str
    architecture: str
    bandwidth: float  # bytes a second
    multiprocessors: int
    clock: float  # boost, in Hz

    def memory(self, moved: float) -> float:
        """Picoseconds to move ``moved`` bytes."""
        return moved / self.bandwidth * 1e12

    def execution(self, route: Route) -> tuple[float, str]:
        """Picoseconds that the instructions of an element take at least, and the unit that takes them."""
        cycles, unit = route.cycles()
        return cycles / 32 / (self.multiprocessors * self.clock) * 1e12, unit

    def waiting(self, kernel: Resources) -> float:
        """Picoseconds an element, where threads load 16 bytes of each tensor, wait for them, and load the next."""
        threads = occupancy(kernel) * WARPS * 32 * self.multiprocessors
        return LATENCY * 1e3 / (4 * threads)


GPUS = (Gpu("A100", "sm_80", 2.0e12, 108, 1.41e9), Gpu("H100", "sm_90", 3.35e12, 132, 1.83e9))


def occupancy(kernel: Resources) -> float:
    """The share of a multiprocessor's warps that can be resident."""
    warps = kernel.threads // 32
    registers = -(-kernel.registers * 32 // REGISTER_STEP) * REGISTER_STEP * warps
    blocks = min(
        BLOCKS, WARPS // warps, REGISTERS // registers, SHARED[kernel.architecture] // (kernel.shared + SYSTEM_SHARED)
    )
    return blocks * warps / WARPS
