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
#: and 512, and the most that spill there, in bytes and in registers. ``docs/triton.md`` says why some do.
CEILINGS: list[tuple[str, tuple[int, int], tuple[int, int]]] = [
    (r"(sphere|oblique|stiefel) 3x3 channels_last, norms.*", (160, 256), (0, 0)),
    (r"(sphere|oblique|stiefel) 3x3 channels_last, steps.*", (255, 256), (0, 0)),
    (r"(sphere|oblique|stiefel) 3x3 bfloat16", (160, 128), (0, 0)),
    (r"stiefel 3x3 exp", (80, 128), (16, 0)),
    (r"(sphere|oblique|stiefel) 3x3 .*", (96, 128), (0, 0)),
    (r"stiefel (128x128 .*|64x128 .* float64)", (128, 256), (2000, 96)),
    (r"stiefel 64x64 qr float64", (128, 256), (320, 0)),
    (r"stiefel 16x16 exp", (240, 256), (0, 0)),
    (r"stiefel 16x16 qr", (168, 128), (0, 0)),
    (r"stiefel 32x32 (cayley|exp)", (128, 256), (32, 0)),
    (r"stiefel .*", (128, 256), (0, 0)),
    (r"(sphere|oblique) .*", (144, 128), (0, 0)),
    (r"sgd_g 576.*", (80, 64), (16, 0)),
    (r"(psi_sgd|adam_g) 576.*", (104, 128), (0, 0)),
    (r"euclidean.*", (48, 32), (0, 0)),
    (r"qr .*", (128, 128), (0, 0)),
    (r"polar 32x32 float64", (128, 128), (80, 0)),
    (r"polar .*", (168, 256), (0, 0)),
]
#: Kernels whose loads and stores are 16 bytes wide, and the least share of them; the rest are accesses to the tables.
FAST = {
    r"(sphere|oblique|stiefel) 3x3 channels_last.*": 0.85,
    r"(sphere 4608|euclidean).*": 0.85,
    r"(oblique 512x256|psi_sgd 576).*": 0.7,
    r"(sgd_g|adam_g) 576.*": 0.55,
}


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
    least = next((share for pattern, share in FAST.items() if re.fullmatch(pattern, row["kernel"])), 0.0)
    if row["share"] < least:
        faults.append(f"{row['share']:.0%} by 16 bytes, at least {least:.0%}")
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
