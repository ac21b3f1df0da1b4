"""The kernels that older processors take: the same steps in processes of their own, within the same bounds."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_lockstep import ARRANGEMENTS, DTYPES, FG, MOMENTA, VECTOR_RULES, check, one_group
from stepping import copy, group, run_steps
from test_cpu_collections import dealt

from manifold_kernels import ops
from manifold_kernels.views import Layout

if (missing := ops.extension_error()) is not None:
    pytest.skip(f"the compiled kernels are not there: {missing}", allow_module_level=True)

#: ATEN_CPU_CAPABILITY, the kernels that are to be taken, and whether the processor can.
CAPABILITIES = {
    "default": ("baseline", lambda: True),
    "avx2": ("avx2", torch.cpu._is_avx2_supported),
    "avx512": ("avx512", torch.cpu._is_avx512_supported),
}


def step_the_grid() -> int:
    """Every manifold, retraction, rule and type over the ways through the kernels; the number of cases."""
    turn = itertools.cycle(itertools.product(ARRANGEMENTS[:3], MOMENTA[:3], (False, True)))
    count = 0
    for (of, option), dtype in itertools.product([*FG, *VECTOR_RULES], DTYPES):
        fg = (of, option) in FG
        shapes = [
            ((3, 7, 3, 3), "kernel"),
            ((3, 7, 2, 3), "kernel"),
            ((3, 6, 4, 4), "kernel"),
            ((2, 3, 17, 17), "kernel"),
            ((1, 1200, 1, 2), "kernel"),  # more blocks of two numbers than a tile may have
        ]
        if option == "qr":
            shapes += [
                ((1, 3, 33, 20), "kernel"),
                ((1, 2, 64, 32), "kernel"),
                ((40, 24), "matrix"),
                ((100, 7), "matrix"),
            ]
        for shape, view in shapes if fg else [((5, 7), "filter"), ((5, 100), "filter"), ((5, 67, 3, 3), "filter")]:
            arrangement, options, individual = next(turn)
            hyper = {"lr": 0.2, **options}
            if not fg:
                hyper = {"lr": 0.2, "momentum": 0.9}
            case = one_group(
                of,
                option,
                shape,
                Layout(view),
                dtype=dtype,
                arrangement=arrangement,
                individual=individual and fg,
                step_size="general" if individual and fg else "none",
                hyper=hyper,
                grad_size=0.5 if fg else 0.03,
            )
            check(case, steps=2)
            count += 1
    for shape in ((7, 9), (8, 16)):
        check(dealt(shape, 9))
        count += 1
    return count


def step_as_torch() -> int:
    """Euclidean groups against ``torch.optim.SGD(foreach=False, fused=False)`` to the bit; the number of cases."""
    count = 0
    for dtype, options, nesterov in itertools.product(
        (torch.float32, torch.float64), ({"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.0}), (False, True)
    ):
        if nesterov and not options["momentum"]:
            continue
        for weight in (torch.randn(1003, dtype=dtype), torch.randn(6, 7, 3, 3, dtype=dtype)):
            if weight.dim() == 4:
                weight = weight.to(memory_format=torch.channels_last)
            grads = [torch.randn_like(weight) for _ in range(3)]
            expected = torch.nn.Parameter(copy(weight))
            optimizer = torch.optim.SGD([expected], lr=0.13, nesterov=nesterov, foreach=False, fused=False, **options)
            for grad in grads:
                expected.grad = grad.clone()
                optimizer.step()
            hyper = {"lr": 0.13, "nesterov": float(nesterov), **options}
            step = torch.ops.manifold_kernels.step_
            run = run_steps(step, [weight], [[grad] for grad in grads], [group("euclidean")], [hyper])
            assert torch.equal(run.params[0], expected.detach())
            count += 1
    return count


def main() -> None:
    from manifold_kernels import _C

    torch.manual_seed(0)
    torch.set_num_threads(1)
    report = {
        "torch": torch.backends.cpu.get_cpu_capability(),
        "kernels": _C.build_info()["instruction_set"],
        "cases": step_the_grid(),
        "torch cases": step_as_torch(),
    }
    print(json.dumps(report))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_instruction_set(capability: str) -> None:
    wanted, supported = CAPABILITIES[capability]
    if not supported():
        pytest.skip(f"this processor has no {capability}")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, __file__], env=environment, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["torch"] == capability.upper() and report["kernels"] == wanted
    assert report["cases"] > 100 and report["torch cases"] > 10


if __name__ == "__main__":
    main()
