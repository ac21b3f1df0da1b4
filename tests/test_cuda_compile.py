"""What the CUDA kernels take on GPUs that are not there: ceilings of registers, stack and shared memory, no spills,
loads of 16 bytes, and time that instructions and bytes of a step must take."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
cuda = importlib.import_module("cuda_resources")
cuda_gpus = importlib.import_module("cuda_gpus")
cuda_routes = importlib.import_module("cuda_routes")

if (reason := cuda.missing()) is not None:
    if os.environ.get("MANIFOLD_KERNELS_CI"):
        raise RuntimeError(f"the CUDA kernels must be compiled here, but {reason}")
    pytest.skip(f"the CUDA kernels cannot be compiled: {reason}", allow_module_level=True)

#: Kernels by pattern, the first that fits counts: the most registers of a thread, bytes of its stack and bytes of a
#: block's shared memory. A thread cannot have more than 255; up to 64, 80 and 128 a multiprocessor holds 1024, 768 and
#: 512 threads. Matrices lie in registers, not on the stack; there are the digits of pi for angles that are long (exp
#: and Grassmann), and what takes over where the iteration for a polar factor does not converge. No kernel spills.
CEILINGS: list[tuple[str, int, int, int]] = [
    (r"small stiefel qr (2x2|3x2|3x3) float step", 64, 0, 17_000),
    (r"small (sphere|oblique) projection (2x2|3x3) float step", 64, 0, 17_000),
    (r"small (sphere|oblique) exp (2x2|3x3) float step", 64, 32, 17_000),
    (r"small (sphere|oblique|stiefel) (2x2|3x3) float measure", 64, 0, 17_000),
    (r"small stiefel (polar|cayley|exp) .* float step", 96, 3200, 17_000),
    (r"small stiefel (polar|cayley|exp) .* double step", 168, 6300, 31_000),
    (r"small (sphere|oblique) exp .*float step", 255, 32, 52_000),
    (r"small (sphere|oblique) exp .*double step", 255, 40, 80_000),
    (r"small .*float .*", 255, 0, 52_000),
    (r"small .*double .*", 255, 0, 80_000),
    (r"elements .*", 80, 0, 256),
    (r"advance", 32, 0, 0),
    (r"(vectors|grassmann) .*", 128, 40, 512),
    (r"scale_invariant .*", 128, 0, 512),
    (r"matrices .*", 255, 0, 512),
    (r"(qr|polar) [23]x[23] float", 64, 0, 5_000),
    (r"(qr|polar) [456]x[456] float", 80, 0, 13_000),
    (r"(qr|polar) \dx\d .*", 168, 0, 26_000),
    (r"polar thread .*", 128, 64, 256),
    (r"(qr|polar) (thread|32|256) .*", 128, 0, 256),
]
#: What launches set aside for the arrays that kernels declare (csrc/cuda/limits.h).
DECLARED = 1024

#: Kernels of contiguous tensors. For each of three types in float, and for double, they load W, gradient and momentum
#: 16 bytes at a time, and store momentum, and in the step W.
FAST = re.compile("elements|small|vectors|scale_invariant|grassmann|matrices")
#: Those of batches load a matrix so, and store Q and R, or the polar factor; but for teams, whose last product stores
#: its numbers one by one.
BATCHES = re.compile("qr|polar")
ONE_BY_ONE = re.compile("polar (32|256) ")


def check(architecture: str) -> None:
    found = cuda.resources(architecture)
    assert len(found) == len({kernel.name for kernel in found})
    # Sizes to 8 x 8 in float, and every source's first kernel.
    names = {kernel.name for kernel in found}
    assert {"small stiefel qr 3x3 float step", "small stiefel qr 8x8 float step", "advance"} <= names
    assert {"qr 3x3 float", "qr 8x8 float", "polar 3x3 double", "polar 256 float"} <= names
    assert sum(name.startswith("small stiefel qr") and "float" in name for name in names) == 7 * 8 // 2
    faults = [fault for kernel in found for fault in faults_of(kernel)]
    assert not faults, "\n".join(faults)


def faults_of(kernel: Any) -> list[str]:
    ceiling = next((row for row in CEILINGS if re.fullmatch(row[0], kernel.name)), None)
    if ceiling is None:
        return [f"{kernel.name}: no row of CEILINGS fits it"]
    _, registers, stack, shared = ceiling
    faults = []
    for what, taken, most in (
        ("registers", kernel.registers, registers),
        ("bytes spilled", kernel.spills, 0),
        ("bytes of stack", kernel.stack, stack),
        ("bytes of shared memory", kernel.shared, shared),
        ("bytes of declared shared memory", kernel.declared, DECLARED),
    ):
        if taken > most:
            faults.append(f"{taken} {what}, at most {most}")
    if FAST.match(kernel.name):
        types, stored = 1 if kernel.wide else 3, 2 if kernel.name.endswith("step") else 1
        stored -= kernel.name.startswith("elements") and not kernel.name.endswith("step")
        if kernel.loads[128] < 3 * types or kernel.stores[128] < stored * types:
            faults.append(f"{kernel.loads[128]} loads and {kernel.stores[128]} stores of 16 bytes")
    if BATCHES.match(kernel.name):
        stored = 0 if ONE_BY_ONE.match(kernel.name) else 1 + kernel.name.startswith("qr")
        if kernel.loads[128] < 1 or kernel.stores[128] < stored:
            faults.append(f"{kernel.loads[128]} loads and {kernel.stores[128]} stores of 16 bytes")
    return [f"{kernel.name}, {kernel.architecture}: {fault}" for fault in faults]


@pytest.mark.parametrize("gpu", cuda_gpus.GPUS, ids=lambda gpu: gpu.name)
def test_a_step_moves_the_bytes_of_a_euclidean_one_and_waits_for_them(gpu: Any) -> None:
    """Contiguous float32 matrices to 8 x 8: W, gradient and momentum are read, W and momentum written, 20 bytes an
    element, four fifths of everything 16 bytes at a time; and no unit of a multiprocessor takes longer than memory."""
    ways = cuda_routes.routes(gpu.architecture)
    assert {"small stiefel qr 8x8 float step", "small sphere projection 3x3 float step"} <= ways.keys()
    for way in ways.values():
        assert way.wide == 20, way
        assert way.share() >= 0.8, way
        assert gpu.execution(way)[0] < gpu.memory(way.wide), way


def test_hopper() -> None:
    check("sm_90")


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["sm_80", "sm_100"])
def test_other_architectures(architecture: str) -> None:
    check(architecture)
