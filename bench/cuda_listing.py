"""Cubins as lists of instructions, by the disassembler that Triton's package brings."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One line of a listing; ``target``: where it branches to or what it calls."""

    address: int
    opcode: str
    target: int | None

    def global_bits(self, kind: str) -> int | None:
        """How many bits a thread loads (``kind`` is ``"LD"``) or stores (``"ST"``); ``None`` where it does not.

        Addresses that come out of tables are generic, without the G.
        """
        match = re.fullmatch(rf"{kind}G?\.E(.*)", self.opcode)
        return _bits(match[1]) if match else None

    def shared_bits(self) -> int | None:
        """How many bits of shared memory a thread reads or writes."""
        match = re.fullmatch(r"(?:LDS|STS)(.*)", self.opcode)
        return _bits(match[1]) if match else None


def listings(cubin: Path) -> dict[str, list[Instruction]]:
    """The instructions of every kernel of ``cubin``, by its mangled name; the subroutines of a kernel at its end."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    code = subprocess.run([str(tool), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    functions = re.findall(r"Function : (\w+)\n(.*?)(?=\n\s*Function : |\Z)", code, re.DOTALL)
    return {name: _instructions(text) for name, text in functions}


def plain(names: Iterable[str]) -> list[str]:
    """Mangled names as C++ writes them."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def _instructions(text: str) -> list[Instruction]:
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)(.*?);", text, re.MULTILINE)
    found = []
    for address, opcode, operands in lines:
        jumps = opcode.startswith(("BRA", "CALL")) and opcode != "BRA.DIV"
        target = re.search(r"0x([0-9a-f]+)", operands) if jumps else None
        if opcode not in ("NOP", "BRA.DIV"):
            found.append(Instruction(int(address, 16), opcode, int(target[1], 16) if target else None))
    return found


def _bits(modifiers: str) -> int:
    small = {".U8": 8, ".S8": 8, ".U16": 16, ".S16": 16}
    wide = (bits for bits in (256, 128, 64) if f".{bits}" in modifiers)
    return next(wide, next((bits for text, bits in small.items() if text in modifiers), 32))
