"""Kernels compiled ahead: what ``warm_up`` asks Triton for is what a step launches afterwards, fusion pinned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu_lockstep import Case, one_group
from stepping import Run, hyper_table, like, start
from torch import Tensor
from triton_interpreted import decompositions, launch

from manifold_kernels.plan import Plan
from manifold_kernels.views import Layout

KERNEL, FILTER, MATRIX = Layout("kernel"), Layout("filter"), Layout("matrix")


class Recorder:
    """A kernel that notes what it is compiled with, or launched with, and does neither."""

    def __init__(self, name: str, compiled: list[Any], launched: list[Any]) -> None:
        self.name, self.compiled, self.launched = name, compiled, launched

    def specialised(self, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
        """What Triton tells compiled kernels apart by."""
        seen = [(a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else a for a in arguments]
        return self.name, tuple(seen), tuple(sorted((key, str(value)) for key, value in constants.items()))

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **constants: Any) -> None:
        assert grid[0] > 0
        self.compiled.append(self.specialised(arguments, constants))

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: self.launched.append(self.specialised(arguments, constants))


def arguments_of(case: Case) -> tuple[Run, list[Any]]:
    run = start([case.weight], case.groups, [case.hyper])
    run.params[0] = case.weight
    plan = Plan.build(case.groups, run.params)
    states = [run.momenta, run.variances, run.steps, run.nonfinite]
    grads = [like(case.weight, 0.1)]
    return run, [run.params, grads, *states, plan.groups, plan.components, plan.scales, hyper_table([case.hyper])]


@pytest.mark.parametrize(
    ("of", "option", "shape", "layout"),
    [
        ("stiefel", "qr", (2, 3, 3, 3), KERNEL),
        ("stiefel", "qr", (2, 3, 7, 6), KERNEL),
        ("oblique", "projection", (200, 300), MATRIX),
        ("grassmann", "sgd_g", (4, 300), FILTER),
    ],
)
def test_a_step_finds_everything_compiled(
    of: str, option: str, shape: tuple[int, ...], layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = one_group(of, option, shape, layout, hyper={"momentum": 0.9}, step_size="none")
    run, arguments = arguments_of(case)
    before = [tensor.clone() for tensor in (case.weight, run.momenta[0], run.steps, run.nonfinite)]
    compiled: list[Any] = []
    launched: list[Any] = []
    launch.forget()
    plain = launch._launch

    def recorded(what: Any, *rest: Any) -> None:
        name = f"{what.kernel.function.__module__}.{what.kernel.function.__name__}"
        recorder = Recorder(name, compiled, launched)
        plain(launch.replace(what, kernel=launch.replace(what.kernel, function=recorder)), *rest)

    monkeypatch.setattr(launch, "_launch", recorded)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    launch.warm_up(*arguments)
    assert compiled and not launched
    after = (case.weight, run.momenta[0], run.steps, run.nonfinite)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    launch.step_(*arguments)
    assert launched == compiled and all(map(pinned, launched))
    launch.forget()


def pinned(specialised: tuple[Any, ...]) -> bool:
    """Whether what is fused is left to the kernel alone."""
    return dict(specialised[-1])["enable_fp_fusion"] == "False"


def test_decompositions_are_compiled_as_steps_are(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    monkeypatch.setattr(decompositions, "INTERPRETED", False)
    x = torch.randn(5, 3, 3)
    decompositions._launch(Recorder("qr", [], launched), x, x, x, WITH_R=True)
    assert len(launched) == 1 and all(map(pinned, launched))
