"""A step is one call that allocates nothing."""

from __future__ import annotations

import pytest
import torch
from cpu_engines import FILTER
from stepping import place_
from torch.utils._python_dispatch import TorchDispatchMode

from manifold_kernels import ops
from manifold_kernels.manifolds import Sphere

if (missing := ops.extension_error()) is not None:
    pytest.skip(f"the compiled kernels are not there: {missing}", allow_module_level=True)


#: All convolutions of ResNet-18.
RESNET_18 = [
    (64, 3, 7, 7),
    *[(64, 64, 3, 3)] * 4,
    (128, 64, 3, 3),
    (128, 64, 1, 1),
    *[(128, 128, 3, 3)] * 3,
    (256, 128, 3, 3),
    (256, 128, 1, 1),
    *[(256, 256, 3, 3)] * 3,
    (512, 256, 3, 3),
    (512, 256, 1, 1),
    *[(512, 512, 3, 3)] * 3,
]


class Calls(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_of_all_convolutions_is_one_operator_that_allocates_nothing() -> None:
    from manifold_kernels.optim import FGSGD

    weights = [torch.nn.Parameter(torch.eye(*shape[2:]).expand(shape).clone()) for shape in RESNET_18]
    kernels = [{"params": [w for w in weights if w.shape[2] > 1], "manifold": "stiefel"}]
    pointwise = [{"params": [w for w in weights if w.shape[2] == 1], "manifold": "sphere", "view": "filter"}]
    for w in pointwise[0]["params"]:
        place_(Sphere(), w, FILTER)
    optimizer = FGSGD(kernels + pointwise, lr=0.1, momentum=0.9, backend="cpu")
    for w in weights:
        w.grad = torch.full_like(w, 1e-3)
    optimizer.step()
    with Calls() as calls:
        optimizer.step()
    # torch.optim marks every step for the profiler.
    assert [name for name in calls.names if not name.startswith("profiler.")] == ["manifold_kernels.step_.default"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    operators = [event.name for event in profile.events() if "::" in event.name]
    assert operators == ["manifold_kernels::step_"]
    assert not any(event.cpu_memory_usage for event in profile.events())
