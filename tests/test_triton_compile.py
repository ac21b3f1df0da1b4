"""What the kernels take on GPUs that are not there: ceilings of registers and spills, 16 bytes at a time on fast paths,
and no multiply-add but those that are written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

HERE = Path(__file__).parent

#: Kernels by pattern, the first that fits counts: the most registers of a thread on NVIDIA's GPUs and on AMD's, of 255
#: and 512, and the most that spill there, in bytes and in registers.
CEILINGS: list[tuple[str, tuple[int, int], tuple[int, int]]] = [
    (r".*", (255, 512), (0, 0)),
]
#: Kernels that load and store 16 bytes at a time.
FAST = re.compile(
    r"(sphere|oblique|stiefel) 3x3 channels_last|sphere 4608|oblique 512x256|euclidean|(psi_sgd|sgd_g|adam_g) 576"
)


def compiled(script: str, *arguments: str) -> list[dict[str, Any]]:
    """What ``script`` reports, in a process where kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent)])
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict[str, Any]]) -> None:
    faults = [fault for row in found for fault in faults_of(row)]
    assert found and not faults, "\n".join(faults)


def faults_of(row: dict[str, Any]) -> list[str]:
    of = row["target"].startswith("gfx")
    registers, spills = next(limits for pattern, *limits in CEILINGS if re.fullmatch(pattern, row["kernel"]))
    faults = []
    if row["registers"] > registers[of]:
        faults.append(f"{row['registers']} registers, at most {registers[of]}")
    if row["spills"] > spills[of]:
        faults.append(f"{row['spills']} spilled, at most {spills[of]}")
    # What is left are accesses to the tables, some thirty of a kernel's hundred.
    if FAST.match(row["kernel"]) and row["share"] < 0.7:
        faults.append(f"{row['share']:.0%} by 16 bytes")
    return [f"{row['kernel']}, {row['target']}: {fault}" for fault in faults]


def test_hopper() -> None:
    check(compiled("triton_compiled.py", "sm_90"))


@pytest.mark.long
def test_all_targets() -> None:
    check(compiled("triton_compiled.py", "--all", "sm_80", "sm_90", "sm_100", "gfx942"))


def test_no_multiply_add_but_those_that_are_written() -> None:
    """One of two is; with a kernel's options the compilers leave the other alone, which they would fuse else."""
    for row in compiled("triton_fused.py", "sm_90", "gfx942"):
        assert (row["pinned"], row["fused"]) == (1, 2), row
