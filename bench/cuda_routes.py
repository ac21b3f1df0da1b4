"""What one step costs a GPU: the instructions and bytes of the way that contiguous float32 weights with momentum take.

``cuda_routes.cu`` makes binaries of that way alone, for matrices to a thread. Instructions are counted in them, those
of loops over 16-byte chunks as often as they run. Whatever has a condition counts as taken, but for subroutines
(quotients and roots of numbers near the ends of their range) and the loop that spares matrices which stay as they are.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cuda_listing import Instruction, listings, plain
from cuda_resources import compiled, name_of

SOURCE = Path(__file__).with_suffix(".cu")

#: Instructions by the unit that runs them, by what their names begin with; all others are only issued. Integer
#: multiply-adds run where those of floats do.
UNITS = {
    "float": ("FADD", "FMUL", "FFMA", "IMAD", "HFMA2"),
    "integer": ("IADD", "VIADD", "ISETP", "LOP3", "SHF", "SEL", "LEA", "PRMT", "FSETP", "FSEL", "FMNMX"),
    "special": ("MUFU", "F2F", "F2I", "I2F"),
    "double": ("DADD", "DMUL", "DFMA", "DSETP"),
}

#: What a multiprocessor does in a cycle, in instructions of a warp (CUDA C++ Programming Guide, "Throughput of Native
#: Arithmetic Instructions", over 32); "memory" in 128 bytes of the first-level cache or shared memory.
RATES = {
    "sm_80": {"issue": 4.0, "float": 2.0, "integer": 2.0, "special": 0.5, "double": 1.0, "memory": 1.0},
    "sm_90": {"issue": 4.0, "float": 4.0, "integer": 2.0, "special": 0.5, "double": 2.0, "memory": 1.0},
}

#: Bytes of memory that a load from tables takes, at one address for all threads of a warp; and a matrix's scale.
SECTOR, SCALE = 32, 8


@dataclass(frozen=True)
class Route:
    """A step's way through the kernel ``name``, for an element of a thread's matrix.

    ``work`` says what each unit has to do: instructions, and for "memory" 4 bytes each. ``wide`` and ``other`` are
    bytes of global memory, by 16 at a time and otherwise.
    """

    name: str
    architecture: str
    work: dict[str, float]
    wide: float
    other: float

    def cycles(self) -> tuple[float, str]:
        """Those of a multiprocessor, for an element of each of 32 threads, and the unit that takes them."""
        return max((self.work.get(unit, 0) / rate, unit) for unit, rate in RATES[self.architecture].items())

    def share(self) -> float:
        """Of the bytes of global memory those by 16 at a time."""
        return self.wide / (self.wide + self.other)


def routes(architecture: str) -> dict[str, Route]:
    """The ways through the kernels of ``cuda_routes.cu``, by the kernels' names."""
    (cubin,) = compiled([SOURCE], architecture)
    code = listings(cubin)
    found = [_of(signature, architecture, code[name]) for name, signature in zip(code, plain(code), strict=True)]
    return {route.name: route for route in found}


def _of(signature: str, architecture: str, code: list[Instruction]) -> Route:
    name, _, elements = name_of(signature, SOURCE.stem)
    work: Counter[str] = Counter()
    wide = other = 0.0
    for one, times in _executed(code, elements):
        unit = next((unit for unit, names in UNITS.items() if one.opcode.startswith(names)), None)
        bits = one.global_bits("LD") or one.global_bits("ST")
        work["issue"] += times
        if unit is not None:
            work[unit] += times
        work["memory"] += times * (bits or one.shared_bits() or 0) / 32
        if bits == 128:
            wide += times * 16
        elif bits:
            other += times * SECTOR / 32
    return Route(
        name,
        architecture,
        {unit: n / elements for unit, n in work.items()},
        wide / elements,
        (other + SCALE) / elements,
    )


def _executed(code: list[Instruction], elements: int) -> list[tuple[Instruction, float]]:
    """The instructions of a step, and how often a thread comes to them."""
    subroutines = min((one.target for one in code if one.opcode.startswith("CALL") and one.target), default=None)
    code = [one for one in code if subroutines is None or one.address < subroutines]
    times = {one.address: 1.0 for one in code}
    for last in code:
        # An endless loop fills the end of every kernel.
        if not last.opcode.startswith("BRA") or last.target is None or last.target >= last.address:
            continue
        loop = [one for one in code if last.target <= one.address <= last.address]
        in_chunks = any(128 in (one.global_bits("LD"), one.global_bits("ST")) for one in loop)
        assert in_chunks or any(one.global_bits("ST") for one in loop), "a loop that neither moves chunks nor spares"
        times |= {one.address: elements / 4 if in_chunks else 0.0 for one in loop}
    return [(one, times[one.address]) for one in code]
