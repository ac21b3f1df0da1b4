"""Compiles kernels for GPUs that are not there and prints what they take as JSON; run in a process of its own, without
the interpreter: ``python tests/triton_compiled.py [--all] TARGET...``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

import torch
from cpu_lockstep import Case, one_group
from stepping import hyper_table, start

from manifold_kernels.plan import Plan
from manifold_kernels.triton import compiling, decompose, decompositions, planning, tables
from manifold_kernels.views import Layout

KERNEL, FILTER, MATRIX, FLAT = Layout("kernel"), Layout("filter"), Layout("matrix"), Layout("flat")
SGD = {"lr": 0.1, "momentum": 0.9}


#: Stiefel matrices of which a program has a block, or one.
STIEFEL = [
    (8, 8, "qr"),
    (8, 8, "polar"),
    (8, 8, "cayley"),
    (8, 8, "exp"),
    (32, 32, "qr"),
    (32, 32, "polar"),
    (6, 5, "qr"),
    (7, 4, "cayley"),
    (16, 16, "qr"),
    (16, 16, "exp"),
    (32, 32, "cayley"),
    (32, 32, "exp"),
    (64, 64, "qr"),
    (64, 64, "polar"),
    (64, 64, "cayley"),
    (64, 64, "exp"),
    (128, 128, "qr"),
    (128, 128, "polar"),
]
#: The same in float64.
WIDE = [(3, 3, "qr"), (8, 8, "qr"), (32, 32, "exp"), (64, 64, "qr"), (64, 128, "polar")]
#: Decompositions: sizes and types.
DECOMPOSITIONS = [
    (3, 3, torch.float32),
    (8, 8, torch.float32),
    (3, 3, torch.float64),
    (32, 32, torch.float32),
    (64, 64, torch.float32),
    (32, 32, torch.float64),
]
#: What takes long to compile, or is like another: with ``--all`` only.
MORE = [
    *(f"stiefel {n}x{p} {option}" for n, p, option in STIEFEL[6:]),
    *(f"stiefel {n}x{p} {option} float64" for n, p, option in WIDE[2:]),
    *(f"{what} {size}" for what in ("qr", "polar") for size in ("64x64", "32x32 float64")),
]

#: One case for each kernel, compiled with AMP's numbers too.
SCALED = ("euclidean", "stiefel 3x3 channels_last", "sphere 4608", "stiefel 8x8 polar", "psi_sgd 576", "adam_g 576")


def on(target: str) -> str:
    """``target``, planned for from now on: AMD's warps have twice as many threads."""
    planning.WARP = 32 if compiling.TARGETS[target].backend == "cuda" else 64
    planning.LANES = 4 * planning.WARP
    return target


def kernels(case: Case, amp: bool) -> list[planning.Kernel]:
    """What a step of ``case`` launches, the sum of partial norms left out."""
    run = start([case.weight], case.groups, [case.hyper])
    run.params[0] = case.weight
    plan = Plan.build(case.groups, run.params)
    made = planning.schedule(plan, run.params, [run.params[0]], run.momenta, hyper_table([case.hyper]), False, amp)
    return [launch.kernel for launch in made.launches if not launch.sums]


def cases() -> dict[str, Case]:
    """One for each kernel that an optimizer meets, by name."""
    out = {}
    for of, option in (("sphere", "projection"), ("oblique", "projection"), ("stiefel", "qr")):
        for how in ("channels_last", "contiguous"):
            out[f"{of} 3x3 {how}"] = one_group(
                of, option, (64, 64, 3, 3), KERNEL, hyper=SGD, step_size="general", arrangement=how
            )
        out[f"{of} 3x3 bfloat16"] = one_group(
            of, option, (64, 64, 3, 3), KERNEL, hyper=SGD, arrangement="channels_last", dtype=torch.bfloat16
        )
    for option in ("polar", "cayley", "exp"):
        out[f"stiefel 3x3 {option}"] = one_group("stiefel", option, (64, 64, 3, 3), KERNEL, hyper=SGD)
    for n, p, option in STIEFEL:
        out[f"stiefel {n}x{p} {option}"] = one_group("stiefel", option, (8, 8, n, p), KERNEL, hyper=SGD)
    for n, p, option in WIDE:
        name = f"stiefel {n}x{p} {option} float64"
        out[name] = one_group("stiefel", option, (8, 8, n, p), KERNEL, hyper=SGD, dtype=torch.float64)
    out["sphere 4608"] = one_group("sphere", "projection", (64, 4608), FILTER, hyper=SGD, step_size="general")
    out["sphere 576 exp"] = one_group("sphere", "exp", (64, 576), FILTER, hyper=SGD)
    out["oblique 512x256"] = one_group("oblique", "projection", (256, 512), MATRIX, hyper=SGD, step_size="general")
    for option in ("psi_sgd", "sgd_g", "adam_g"):
        of = "scale_invariant" if option == "psi_sgd" else "grassmann"
        out[f"{option} 576"] = one_group(of, option, (64, 576), FILTER, hyper=SGD)
    out["euclidean"] = one_group("euclidean", "add", (64, 576), FLAT, hyper=SGD)
    return out


def report(name: str, kernel: planning.Kernel, target: str, types: Mapping[str, str]) -> None:
    found = compiling.compile_kernel(kernel, target, types)
    line = {"registers": found.registers, "spills": found.spills, "share": round(found.share(), 2)}
    print(json.dumps({"kernel": name, "target": target, **line}), flush=True)


def steps(everything: bool, targets: list[str]) -> None:
    """What optimizers launch."""
    made = {name: case for name, case in cases().items() if everything or name not in MORE}
    for name, amp in [*((name, False) for name in made), *((name, True) for name in SCALED)]:
        for target in map(on, targets):
            for kernel in kernels(made[name], amp):
                mode = dict(kernel.constants)["MODE"]
                part = {tables.MEASURE.value: ", norms", tables.STEP.value: ", steps"}.get(mode, "")
                report(name + part + ", scaled" * amp, kernel, target, compiling.STEP)


def batches(everything: bool, targets: list[str]) -> None:
    """What ``functional.qr`` and ``polar`` launch."""
    for n, p, dtype in DECOMPOSITIONS:
        x = torch.empty(1024, n, p, dtype=dtype)
        for name, function, more in (("qr", decompose.qr, {"WITH_R": True}), ("polar", decompose.polar, {})):
            name += f" {n}x{p}" + " float64" * (dtype == torch.float64)
            if everything or name not in MORE:
                for target in map(on, targets):
                    kernel, _ = decompositions.planned(function, x, **more)
                    report(name, kernel, target, compiling.DECOMPOSITIONS[dtype])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for what in (steps, batches):
        what("--all" in sys.argv, [target for target in sys.argv[1:] if target != "--all"])
